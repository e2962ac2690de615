"""What each request of the ten recordings is, written down by reading them (mitmdump -nr FILE --flow-detail 3).

A row: session id, session key, kind, the human's text (a subagent's task), repeated attempt, turn. The turn numbers
count (session, trace id) pairs in the order in which they appear in the file; an announcement has its parent's.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    session_id: str | None
    session_key: str | None
    kind: str
    user_text: str | None
    retry: bool
    turn: int


HELLO = "Hello, please introduce yourself in one line."
READ = 'Read my notes. TOOL:read {"path":"notes.txt"} END'
WRITE = 'Write a file. TOOL:write {"path":"out.txt","content":"hi\\n"} END'
ECHO = 'Run echo. TOOL:exec {"command":"echo hello-from-exec"} END'
CODE = 'Read my notes. TOOL:exec {"code":"text(await read({path:\\"notes.txt\\"}))"} END'
DELEGATE = (
    'Delegate. TOOL:tool_call {"id":"sessions_spawn","args":{"task":"Count to three and report back.",'
    '"label":"counter","taskName":"counter"}} END'
)

ANTHROPIC = ("8e4856f4-e274-4b3e-8df6-6418c4c116ba", "agent:main:anthropic-messages-native")
COMPACTED = ("dbaa8c7a-05e6-4753-9e2a-c90c6e115ad7", "agent:main:comp2")
LOOP = ("1be713d3-6e50-46a6-aca0-6ad393792cb3", "agent:main:loop1")
EXEC_1 = ("3a5f272b-4a19-495e-86af-9f2135259e16", "agent:main:explicit:3a5f272b-4a19-495e-86af-9f2135259e16")
EXEC_2 = ("fd81ec20-d097-47d6-b888-5baf53595bfc", "agent:main:explicit:fd81ec20-d097-47d6-b888-5baf53595bfc")
ERR_1 = ("24f19610-8ec6-4982-a528-f3ca75ba2169", "agent:main:err1")
ERR_2 = ("90c5f298-ac37-4b92-82f2-fd85a12f4b67", "agent:main:err2")
ERR_3 = ("11179721-e0e6-42c8-9fd1-8aba6cc112ee", "agent:main:err3")
ERR_4 = ("ad4305d7-64d2-45cf-b472-196ba72b93ee", "agent:main:err4")
GOOGLE = ("cdcf76aa-ad52-46a1-9c06-d4c3bffc5c61", "agent:main:google-generative-ai-native")
MAIN = ("37341618-52f5-45d7-8234-91ebfdc784f7", "agent:main:main")
OLLAMA = ("cce767c6-018e-481b-ad4b-b0fe4539f2ca", "agent:main:ollama2")
COMPLETIONS = ("5c89be32-3adc-43ec-b0fd-efea88de0220", "agent:main:openai-completions")
RESPONSES = ("0c1ded16-2b74-47a9-b945-6590b20c6d71", "agent:main:openai-responses-native-codemode")
PARENT = ("dae2ba3e-722a-4652-8d52-b0ce57519b53", "agent:main:sub1")
CHILD = ("df8878ca-a2e2-4420-a503-07e4cdc7cd3d", "agent:main:subagent:25dd33f1-a594-42bb-9d5d-f863042cd210")

EXPECTED: dict[str, list[Row]] = {
    "anthropic-messages-native": [
        Row(*ANTHROPIC, "main", HELLO, False, 1),
        Row(*ANTHROPIC, "main", READ, False, 2),
        Row(*ANTHROPIC, "tool", READ, False, 2),
        Row(*ANTHROPIC, "main", WRITE, False, 3),
        Row(*ANTHROPIC, "tool", WRITE, False, 3),
        Row(*ANTHROPIC, "main", ECHO, False, 4),
        Row(*ANTHROPIC, "tool", ECHO, False, 4),
    ],
    "compaction-openai-completions": [
        Row(*COMPACTED, "main", "one LONG:20000", False, 1),
        Row(*COMPACTED, "main", "six", False, 2),
        Row(None, None, "compaction", None, False, 3),
        Row(*COMPACTED, "main", "after compaction", False, 4),
    ],
    "env-proxy-loopback-http": [
        Row(*LOOP, "main", "hello loop", False, 1),
        Row(*EXEC_1, "main", "hi there", False, 2),
        Row(*EXEC_2, "main", "hi there", False, 3),
    ],
    "errors-openai-completions": [
        Row(*ERR_1, "main", "Trigger ERR:429 please", False, 1),
        Row(*ERR_1, "main", "Trigger ERR:429 please", True, 1),
        Row(*ERR_2, "main", "Trigger ERR:500 please", False, 2),
        Row(*ERR_2, "main", "Trigger ERR:500 please", True, 2),
        Row(*ERR_3, "main", "Trigger ERR:cut please", False, 3),
        Row(*ERR_3, "main", "Trigger ERR:cut please", True, 3),
        Row(*ERR_4, "main", "hello one", False, 4),
        Row(*ERR_4, "main", "hello two LONG:3000", False, 5),
        Row(*ERR_4, "main", "Trigger ERR:ctx please", False, 6),
    ],
    "google-generative-ai-native": [
        Row(*GOOGLE, "main", HELLO, False, 1),
        Row(*GOOGLE, "main", READ, False, 2),
        Row(*GOOGLE, "tool", READ, False, 2),
        Row(*GOOGLE, "main", WRITE, False, 3),
        Row(*GOOGLE, "tool", WRITE, False, 3),
        Row(*GOOGLE, "main", ECHO, False, 4),
        Row(*GOOGLE, "tool", ECHO, False, 4),
    ],
    "heartbeat-openai-completions": [
        Row(*MAIN, "heartbeat", None, False, 1),
    ],
    "ollama": [
        Row(*OLLAMA, "main", HELLO, False, 1),
        Row(*OLLAMA, "main", READ, False, 2),
        Row(*OLLAMA, "tool", READ, False, 2),
    ],
    "openai-completions": [
        Row(*COMPLETIONS, "main", HELLO, False, 1),
        Row(*COMPLETIONS, "main", READ, False, 2),
        Row(*COMPLETIONS, "tool", READ, False, 2),
        Row(*COMPLETIONS, "main", WRITE, False, 3),
        Row(*COMPLETIONS, "tool", WRITE, False, 3),
        Row(*COMPLETIONS, "main", ECHO, False, 4),
        Row(*COMPLETIONS, "tool", ECHO, False, 4),
    ],
    "openai-responses-native-codemode": [
        Row(*RESPONSES, "main", HELLO, False, 1),
        Row(*RESPONSES, "main", CODE, False, 2),
        Row(*RESPONSES, "tool", CODE, False, 2),
        Row(*RESPONSES, "main", "Thanks. Anything else?", False, 3),
    ],
    "subagent-openai-completions": [
        Row(*PARENT, "main", DELEGATE, False, 1),
        Row(*PARENT, "tool", DELEGATE, False, 1),
        Row(*CHILD, "subagent", "Count to three and report back.", False, 2),
        Row(*PARENT, "announce", None, False, 1),
    ],
}
