"""A log that can't be written must not end the proxy, nor the thread that wanted to say something.

mitmproxy ends the program where a line can't be printed, which is right for ``mitmdump | head``. A service logs to a file,
often on the very disk that has just become full: there it would cut off every agent, and in the spool's thread it would end
that thread without a word and nothing would ever be recorded again. So only a reader that has gone away still ends it.

Limits: lines that can't be written are lost. It holds for the handlers that mitmproxy has when the addon starts to run.
"""

from __future__ import annotations

import logging
import threading

from mitmproxy.addons.termlog import TermLogHandler


def survive_full_disk() -> None:
    """Make mitmproxy's terminal logs drop what can't be written. May be called again."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, TermLogHandler) and not isinstance(handler.emit, _Forgiving):
            handler.emit = _Forgiving(handler)  # type: ignore[method-assign]


class _Forgiving:
    def __init__(self, handler: TermLogHandler) -> None:
        self._emit = handler.emit

    def __call__(self, record: logging.LogRecord) -> None:
        try:
            self._emit(record)
        except SystemExit as e:
            # What mitmproxy makes of an OSError. From another thread it would end that thread only.
            if isinstance(e.__context__, BrokenPipeError) and threading.current_thread() is threading.main_thread():
                raise
