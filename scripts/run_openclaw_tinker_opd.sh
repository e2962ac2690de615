#!/usr/bin/env bash
# On-policy distillation from end to end: OpenClaw's turns are answered by your own model, a teacher says what it thinks of each of
# its tokens, the worker makes optimiser steps of that, and the next turns are answered by the new weights.
#
#   run_openclaw_tinker_opd.sh --model BASE --teacher-url http://HOST:8000/v1 --teacher-model NAME [OPTION…]
#
#   --tinker-url URL          where BASE is trained: a `metaclaw engine`; default: rl.tinker_base_url, else Tinker's cloud
#   --steps N                 optimiser steps to make (5); --batch N turns of each (8)
#   --tasks DIR               what OpenClaw is asked: *.jsonl with {"task_id", "instruction"} a line; default: a few small questions
#   --openclaw-model P/M      one of OpenClaw's models, whose requests are taken over; default: the one it is set to
#   --rounds N                times that all tasks are asked, at most (20); --timeout S seconds for one task (600)
#
# Keys come from the environment: METACLAW_RL_TINKER_API_KEY (or TINKER_API_KEY), METACLAW_OPD_TEACHER_API_KEY. Everything is kept in
# METACLAW_HOME, here ~/.metaclaw-opd unless it is set, so that a home in daily use stays as it is. All other settings are that home's;
# those of rl mode, opd and no judge are set here. OpenClaw is the real one that is installed and keeps its own configuration;
# without it the built-in loop asks llm.* in its place. The proxy listens on a free port of 127.0.0.1 and ends with the script.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }
die() { say "run_openclaw_tinker_opd: $*"; exit 1; }

model='' teacher_url='' teacher_model='' tinker_url='' steps=5 batch=8 tasks='' openclaw_model='' rounds=20 timeout=600
while [ $# -gt 0 ]; do
  option=$1
  case $option in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --model | --teacher-url | --teacher-model | --tinker-url | --steps | --batch | --tasks | --openclaw-model | --rounds | --timeout)
      [ $# -ge 2 ] && [ -n "$2" ] || die "$option needs a value; --help shows all options."
      name=${option#--}
      printf -v "${name//-/_}" %s "$2"
      shift 2
      ;;
    *) die "$option is no option; --help shows all of them." ;;
  esac
done
for name in steps batch rounds timeout; do
  case ${!name} in '' | *[!0-9]* | 0*) die "--$name ${!name} is no whole number from 1 on." ;; esac
done

# ── what is needed ────────────────────────────────────────────────────────────────────────────────────────────────
metaclaw=$ROOT/.venv/bin/metaclaw
[ -x "$metaclaw" ] || metaclaw=$(command -v metaclaw) ||
  die "metaclaw is not installed: run scripts/start once, or pip install 'metaclaw-mitmproxy[rl]'."
python=$(dirname "$metaclaw")/python
[ -x "$python" ] || python=python3
"$python" -c 'import tinker, transformers' 2>/dev/null ||
  die "mode rl needs the Tinker SDK beside $metaclaw: pip install 'metaclaw-mitmproxy[rl]' there."

export METACLAW_HOME=${METACLAW_HOME:-$HOME/.metaclaw-opd}
export METACLAW_MODE=rl METACLAW_OPD_ENABLED=true METACLAW_RL_BATCH_SIZE=$batch METACLAW_RL_WARMUP_TURNS=0 METACLAW_RL_SUPPORT_SHARE=0
export METACLAW_RL_CONTROL_SHARE=0 METACLAW_RL_MIN_SESSIONS=1 METACLAW_JUDGE_ENABLED=false METACLAW_SKILLS_AUTO_EVOLVE=false
[ -z "$model" ] || export METACLAW_RL_MODEL=$model
[ -z "$teacher_url" ] || export METACLAW_OPD_TEACHER_URL=$teacher_url
[ -z "$teacher_model" ] || export METACLAW_OPD_TEACHER_MODEL=$teacher_model
[ -z "$tinker_url" ] || export METACLAW_RL_TINKER_BASE_URL=$tinker_url
[ -z "${TINKER_API_KEY:-}" ] || export METACLAW_RL_TINKER_API_KEY=${METACLAW_RL_TINKER_API_KEY:-$TINKER_API_KEY}

# The settings of that home with the environment over them; what is wrong in them is said by metaclaw itself.
wrong() { # one sentence, or nothing
  "$python" - <<'PYTHON'
import sys
import httpx
from metaclaw_core.errors import MetaClawError
from metaclaw_core.settings import load_settings
try:
    settings = load_settings()
except MetaClawError as e:
    sys.exit(print(e))
rl, opd = settings.rl, settings.opd
if not rl.model:
    sys.exit(print("No student is named: give --model, the base model to train."))
if not opd.teacher_url or not opd.teacher_model:
    sys.exit(print("No teacher is named: give --teacher-url (such as http://HOST:8000/v1) and --teacher-model."))
if not rl.tinker_api_key:
    sys.exit(print("The training server wants a key: set METACLAW_RL_TINKER_API_KEY or TINKER_API_KEY."))
for what, url in (("training server", rl.tinker_base_url), ("teacher", opd.teacher_url)):
    try:
        url and httpx.get(url, timeout=10)
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        sys.exit(print(f"The {what} at {url} can't be reached ({e}): is it running, is the URL right?"))
PYTHON
}
problem=$(cd "$ROOT" && wrong) || die "the settings could not be read; see above."
[ -z "$problem" ] || die "$problem"

if [ -z "$tasks" ]; then
  tasks=$METACLAW_HOME/opd-tasks
  mkdir -p "$tasks"
  number=0
  while read -r question; do
    number=$((number + 1))
    printf '{"task_id": "question-%s", "instruction": "%s"}\n' "$number" "$question"
  done >"$tasks/tasks.jsonl" <<'QUESTIONS'
What can you do for me?
Make a file todo.md with three things that a good morning needs.
How would you find out why a build fails?
Write a haiku about a lobster into poem.txt.
Which files are in this folder?
Explain what a proxy is in two sentences.
Draft a short answer to a friend who asks how the project goes.
Name three ways to make a slow program faster.
QUESTIONS
fi
[ -d "$tasks" ] || die "--tasks $tasks is no folder with *.jsonl files of tasks."

agent=openclaw
command -v openclaw >/dev/null 2>&1 || { agent=loop; say "OpenClaw is not installed: the built-in loop asks llm.* in its place."; }

# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────────
free_port() { # below the ephemeral range, so that no other program is handed it by chance
  local port
  while port=$((20000 + RANDOM % 10000)); (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  printf '%s\n' "$port"
}
read_json() { # EXPRESSION over `it`, the JSON on stdin
  "$python" -c "import json, sys; it = json.load(sys.stdin); print($1)"
}
made() { # how many steps there are, and what the last batch says of KL(student || teacher)
  "$metaclaw" train status --json | read_json \
    '(lambda of: " ".join([str(len(of)), *["%.4f" % s["metrics"]["teacher_kl"] for s in of[-1:]]]))([s for s in it["steps"] if s["version"]])'
}

"$metaclaw" start --detach --mode rl --port "$(free_port)" >&2 || die "the proxy did not start; see above."
trap '"$metaclaw" stop --grace 5 >&2' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ready=
for _ in {1..600}; do # a large tokenizer takes its time
  ready=$("$metaclaw" status --json | read_json 'bool((it.get("route") or {}).get("ready"))')
  [ "$ready" != True ] || break
  sleep 0.5
done
[ "$ready" = True ] || die "the policy server is not ready after 5 minutes; $METACLAW_HOME/logs/policy.log says why."

read -r before _ <<<"$(made)"
done=0
for ((round = 1; round <= rounds; round++)); do
  out=$METACLAW_HOME/opd-rounds/$(date +%Y%m%d-%H%M%S)-$round
  status=0
  "$metaclaw" rollout "$tasks" --out "$out" --agent "$agent" --timeout "$timeout" ${openclaw_model:+--model "$openclaw_model"} >&2 || status=$?
  [ "$status" = 0 ] || [ "$status" = 3 ] || die "the tasks could not be given to the agent; see above."
  status=0
  "$metaclaw" train step --wait 600 >&2 || status=$? # the worker may have made it already
  [ "$status" = 0 ] || [ "$status" = 4 ] || die "the step failed; see above."
  read -r now kl <<<"$(made)"
  done=$((now - before))
  say "round $round: $done of $steps steps are made${kl:+; KL(student || teacher) of the last batch: $kl nats per token}"
  [ "$done" -lt "$steps" ] || break
done
"$metaclaw" train status
[ "$done" -ge "$steps" ] || die "$done of $steps steps were made in $rounds rounds: what was left out and why is said above, and by metaclaw status."
