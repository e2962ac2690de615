"""A library of three dozen hand-made skills, and what people say who need one of them."""

from __future__ import annotations

import pytest

from metaclaw_core.skills import Index, Skill, build_index

_SKILLS = {
    "pull-request-review": "Review a pull request for bugs, style and missing tests.|Read the diff first. Comment on the change, not the author.",
    "git-bisect": "Find the commit that broke something by bisecting the history.|Mark a good and a bad commit; run the failing check at each step.",
    "merge-conflicts": "Resolve merge conflicts after a rebase without losing work.|Look at both sides and the common ancestor.",
    "sql-slow-query": "Make a slow SQL query fast with indexes and query plans.|EXPLAIN ANALYZE shows sequential scans. Add an index on the filtered column.",
    "database-migration": "Plan and write schema migrations for PostgreSQL without downtime.|Add columns as nullable, backfill in batches, then add the constraint.",
    "docker-image-size": "Shrink a Docker image with multi-stage builds.|Copy only artefacts into the last stage. Use .dockerignore.",
    "kubernetes-crashloop": "Diagnose a pod in CrashLoopBackOff on Kubernetes.|kubectl describe and the previous container's logs show the exit code.",
    "pytest-fixtures": "Write clear pytest fixtures and parametrised unit tests in Python.|Prefer small factories. Use tmp_path for files.",
    "csharp-async": "Avoid deadlocks with async and await in C# and .NET.|Do not block on Result. Use ConfigureAwait in libraries.",
    "rust-borrow-checker": "Fix borrow checker and lifetime errors in Rust.|Clone at the edge, borrow inside. Split the struct.",
    "react-rerender": "Stop needless re-renders of React components.|useMemo and stable keys; measure with the profiler.",
    "css-layout": "Lay out a page with flexbox and grid.|Name grid areas. Use gap instead of margins.",
    "regex-helper": "Write and explain regular expressions.|Anchor the pattern and test it with examples that must not match.",
    "bash-scripting": "Write safe bash scripts.|set -euo pipefail, quote variables, trap for clean-up.",
    "log-analysis": "Search large log files for the cause of an outage.|Sort by time, group by request id, look for the first error.",
    "incident-postmortem": "Write a blameless postmortem after an incident.|Timeline, impact, contributing factors, follow-ups with owners.",
    "api-design": "Design REST endpoints with consistent errors and pagination.|Nouns in paths, cursors instead of offsets, problem details for errors.",
    "oauth-login": "Add OAuth login with refresh tokens to a web application.|Use PKCE. Keep refresh tokens on the server.",
    "threat-model": "Make a threat model for a new feature.|Draw trust boundaries; go through spoofing, tampering and disclosure.",
    "csv-cleaning": "Clean a messy CSV file with pandas.|Fix encodings, parse dates, drop duplicate rows.",
    "chart-choice": "Choose the right chart for data and draw it with matplotlib.|Lines for time, bars for categories; label directly.",
    "ab-test": "Plan an A/B test and read its result.|Fix the sample size first. Report the interval, not only the p-value.",
    "quarterly-report": "Write the quarterly report for the board.|Lead with revenue and runway. One page.",
    "cover-letter": "Write a cover letter for a job application.|Two paragraphs: why this company, why you.",
    "meeting-minutes": "Turn meeting notes into minutes with decisions and action items.|Decisions first, then owners and dates.",
    "cold-email": "Write a short cold email to a prospect.|One line of context, one question, no attachments.",
    "translation-review": "Review a translation from German into English.|Check terms, register and false friends.",
    "meal-plan": "Plan vegetarian meals for a week with a shopping list.|Cook once, eat twice. List by shop aisle.",
    "flight-booking": "Find and compare flights.|Check baggage rules and the connection time.",
    "rental-contract": "Check the contract of a rented flat for unusual clauses.|Deposit, notice period, repairs.",
    "tax-return": "Prepare a tax return with deductions for working at home.|Collect receipts by category.",
    "garden-calendar": "What to sow and plant in which month.|Frost dates decide. Tomatoes go out after the last frost.",
    "bike-repair": "Repair a bicycle: punctures, brakes, gears.|Check the pad wear first. Index the derailleur.",
    "running-plan": "A training plan for a half marathon.|Three runs a week, one of them long.",
    "chinese-poem": "写一首七言绝句，讲究平仄和押韵。|先定韵脚，再写意象。",
    "lease-japanese": "賃貸契約書を確認して注意点をまとめる。|敷金、更新料、解約予告を確認する。",
}
_ASKED = {
    "Could you look over PR 482 before we merge? I worry about missing tests.": "pull-request-review",
    "something between v1.2 and now broke the parser, which commit was it?": "git-bisect",
    "I rebased and now have conflicts in six files": "merge-conflicts",
    "this query takes 40 seconds, is an index missing?": "sql-slow-query",
    "add a NOT NULL column to a huge postgres table without downtime": "database-migration",
    "our docker images are 2 GB": "docker-image-size",
    "pod keeps restarting: CrashLoopBackOff": "kubernetes-crashloop",
    "how do I share set-up between unit tests in Python with a fixture": "pytest-fixtures",
    "my C# app hangs when I await something": "csharp-async",
    "error[E0502]: cannot borrow `x` as mutable, Rust": "rust-borrow-checker",
    "the component renders 50 times, React profiler says": "react-rerender",
    "match an ISO date with a regular expression": "regex-helper",
    "the outage last night: here is a 2 GB log file, what happened first?": "log-analysis",
    "we need a postmortem for yesterday's incident": "incident-postmortem",
    "which status code and pagination for GET endpoints": "api-design",
    "users should log in with OAuth": "oauth-login",
    "this CSV has mixed encodings and duplicate rows": "csv-cleaning",
    "sample size for an A/B test of the sign-up button": "ab-test",
    "draft a cover letter for this job": "cover-letter",
    "make minutes with action items from these notes of the meeting": "meeting-minutes",
    "vegetarian shopping list for the week please": "meal-plan",
    "may the landlord keep the deposit? contract attached, rented flat": "rental-contract",
    "when can tomatoes go outside, after which frost": "garden-calendar",
    "half marathon in ten weeks, what should my training look like": "running-plan",
    "帮我写一首绝句，要押韵": "chinese-poem",
    "賃貸の契約書の敷金について": "lease-japanese",
}


@pytest.fixture(scope="session")
def skills() -> tuple[Skill, ...]:
    return tuple(Skill(name, *text.split("|")) for name, text in _SKILLS.items())


@pytest.fixture
def index(skills: tuple[Skill, ...]) -> Index:
    return build_index(skills)


@pytest.fixture(scope="session")
def asked() -> dict[str, str]:
    """What was said → the skill it takes."""
    return _ASKED
