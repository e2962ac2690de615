# Sourced by scripts/start, scripts/test and scripts/lock (bash 3.2 or newer): the virtual environment in .venv.
#
# .venv holds what a lock file in requirements/ names, nothing else, plus this checkout in editable form.
# .venv/installed says what was installed, and is written last: without it .venv is half made and is made anew.
# A run that finds it up to date starts one short Python and no pip. pip's own configuration decides where packages
# come from. test.lock is runtime.lock plus the tools, at the same versions, so the first satisfies the second.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMP=$VENV/installed

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# ── which Python ──────────────────────────────────────────────────────────────────────────────────────────────────
# Prints the path and version of the interpreter behind a name. A name on PATH proves nothing: it can be a shim that
# fails, or a Python whose distribution packages venv apart. Exit status 4: new enough, but it cannot make a venv.
probe_python() {
  "$1" -I -c '
import sys
if sys.version_info < (3, 12) or sys.implementation.name != "cpython":
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(4)
print("%d.%d %s" % (*sys.version_info[:2], sys.executable))
' 2>/dev/null </dev/null
}

pyenv_pythons() { # newest first
  local directory
  for directory in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/; do
    directory=${directory%/}
    printf '%s\n' "${directory##*/}"
  done | sort -t. -k1,1nr -k2,2nr -k3,3nr | while read -r directory; do
    printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}/versions/$directory/bin/python3"
  done
}

python_candidates() {
  printf '%s\n' python3.13 python3.12 python3
  pyenv_pythons
  if command -v uv >/dev/null 2>&1; then uv python find --no-project '>=3.12' 2>/dev/null </dev/null || true; fi
}

find_python() { # sets PYTHON_VERSION and PYTHON_PATH
  local name found status without_venv=
  if [ -n "${PYTHON:-}" ] && ! probe_python "$PYTHON" >/dev/null; then
    say "PYTHON=$PYTHON is no CPython 3.12 or newer that can make a virtual environment: looking for another."
  fi
  while read -r name; do
    [ -n "$name" ] || continue
    status=0
    found=$(probe_python "$name") || status=$?
    if [ "$status" = 0 ] && [ -n "$found" ]; then
      PYTHON_VERSION=${found%% *} PYTHON_PATH=${found#* }
      return 0
    fi
    [ "$status" != 4 ] || without_venv=$name
  done <<EOF
${PYTHON:-}
$(python_candidates)
EOF
  if [ -n "$without_venv" ]; then
    die "$without_venv has no venv module: install it (Debian and Ubuntu: apt install python3-venv), then run this again."
  fi
  die "No Python 3.12 or newer was found: install one (for example python3.12 with its venv package, or pyenv install 3.13), or name it with PYTHON=/path/to/python3, then run this again."
}

# ── what is installed ─────────────────────────────────────────────────────────────────────────────────────────────
hash_of() { # one line for the contents of all files
  if command -v sha256sum >/dev/null 2>&1; then cat "$@" | sha256sum; else cat "$@" | shasum -a 256; fi | cut -d' ' -f1
}

wanted_line() { # KIND: the line of the stamp that says KIND is installed as the files of this checkout ask
  printf '%s %s\n' "$1" "$(hash_of "$ROOT/requirements/$1.lock" "$ROOT/pyproject.toml")"
}

has_line() { # LINE: is it in the stamp? (no grep: this runs on every start)
  local line
  while IFS= read -r line; do [ "$line" != "$1" ] || return 0; done <"$STAMP"
  return 1
}

venv_version() { "$VENV/bin/python" -I -S -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

venv_is_whole() { # installed to the end, from this very place, and its Python still runs
  local version
  [ -f "$STAMP" ] && has_line "root $ROOT" || return 1
  version=$(venv_version) || return 1
  has_line "python $version" || return 1
  if [ -n "${PYTHON:-}" ]; then # asked for by name: another version means another environment
    local asked
    asked=$(probe_python "$PYTHON") || return 0
    [ "${asked%% *}" = "$version" ] || return 1
  fi
}

is_ready() { venv_is_whole && has_line "$(wanted_line "$1")"; }

# ── making it ─────────────────────────────────────────────────────────────────────────────────────────────────────
pip_install() { "$VENV/bin/python" -m pip install -qq --no-input --disable-pip-version-check "$@" </dev/null; }

make_venv() { # KIND; runs under the lock
  local kind=$1
  ! is_ready "$kind" || return 0 # another run made it while this one waited
  if venv_is_whole; then
    # Whoever has more keeps it: installing the smaller set alone could leave the rest at stale versions.
    if grep -q '^full ' "$STAMP"; then kind=full; elif [ "$kind" = runtime ] && grep -q '^test ' "$STAMP"; then kind=test; fi
  else
    [ ! -e "$VENV" ] || say "The environment in .venv is not whole: making it anew."
    rm -rf "$VENV"
    say "Making .venv with Python $PYTHON_VERSION …"
    "$PYTHON_PATH" -m venv "$VENV" || die "$PYTHON_PATH -m venv failed; see above."
  fi
  rm -f "$STAMP"
  say "Installing requirements/$kind.lock …"
  pip_install --require-hashes -r "$ROOT/requirements/$kind.lock" ||
    die "pip could not install requirements/$kind.lock; see above. Run this again to start over."
  pip_install --no-deps --no-build-isolation --no-index --editable "$ROOT" ||
    die "pip could not install this checkout; see above. Run this again to start over."
  {
    printf 'root %s\npython %s\n' "$ROOT" "$(venv_version)"
    wanted_line runtime
    if [ "$kind" != runtime ]; then wanted_line test; fi
    if [ "$kind" = full ]; then wanted_line full; fi
  } >"$STAMP.new" && mv "$STAMP.new" "$STAMP"
}

ensure_venv() { # KIND: runtime, test (and the tools), or full (and torch, 5 GB)
  ! is_ready "$1" || return 0
  find_python
  # One run at a time. The lock is on the open file and outlives the Python that takes it; macOS has no flock(1).
  (
    "$PYTHON_PATH" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || die "cannot lock $ROOT/scripts/_env.sh"
    make_venv "$1" 9<&-
  ) 9<"$ROOT/scripts/_env.sh" || exit 1
}
