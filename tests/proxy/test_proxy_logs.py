from __future__ import annotations

import logging
import os
import threading

import pytest
from mitmproxy.addons.termlog import TermLogHandler

from metaclaw_core.proxy.logs import survive_full_disk


class Unwritable:
    """A log file on a disk that is full, or a pipe whose reader is gone."""

    encoding = "utf-8"

    def __init__(self, error: OSError) -> None:
        self.error = error

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_WRONLY)

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.fixture
def log():
    """``log(error)``: a root logger whose only terminal can't be written."""
    root = logging.getLogger()
    made = []

    def with_error(error: OSError) -> logging.Logger:
        handler = TermLogHandler(Unwritable(error))
        root.addHandler(handler)
        made.append(handler)
        survive_full_disk()
        survive_full_disk()  # once more, as after a reload of the script
        return logging.getLogger("metaclaw.test")

    yield with_error
    for handler in made:
        root.removeHandler(handler)


def test_a_full_disk_costs_the_line_and_nothing_else(log):
    log(OSError(28, "No space left on device")).warning("is lost")


def test_a_reader_that_has_gone_ends_mitmproxy_as_ever(log):
    logger = log(BrokenPipeError(32, "Broken pipe"))
    with pytest.raises(SystemExit):
        logger.warning("nobody reads this")


def test_a_thread_goes_on_whatever_becomes_of_its_words(log):
    logger = log(BrokenPipeError(32, "Broken pipe"))
    done = []

    def work() -> None:
        logger.warning("nobody reads this")
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
