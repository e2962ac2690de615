"""The exception tree.

    MetaClawError                   anything a user may see as one sentence, without a traceback
    ├── ConfigError                 a setting is unknown or has a bad value
    ├── WireError                   bytes are not what the dialect says they should be
    │   └── SpliceError             no proven byte place in a body; the request passes unchanged
    ├── StoreError                  the database can't be used (newer version, damaged, locked for good)
    ├── CaptureError                a file is no capture, or ends too early
    └── SkillError                  a skill breaks the Agent Skills standard

The message says what is wrong, where, and what to do. A new class is added only where somebody
catches it apart from its parent.
"""


class MetaClawError(Exception):
    """Base of all our errors; ``str(e)`` is a complete sentence for the user."""


class ConfigError(MetaClawError):
    """A setting is unknown or has a value that is not allowed."""


class WireError(MetaClawError):
    """A body doesn't have the shape of its dialect; ``str(e)`` is stored as the turn's reason."""


class SpliceError(WireError):
    """No place in the body is proven to be the end of the system prompt."""


class StoreError(MetaClawError):
    """The database can't be opened or is not one of ours."""


class CaptureError(MetaClawError):
    """A file can't be read as a mitmproxy capture or HAR."""


class SkillError(MetaClawError):
    """A SKILL.md breaks the Agent Skills standard."""
