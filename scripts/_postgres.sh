# Sourced by scripts/test: a throw-away PostgreSQL for the store's second backend.
#
# start_postgres makes a cluster in a temporary folder, reachable through a socket in that folder only (no port, no
# password), and exports METACLAW_TEST_POSTGRES. A server that is named there already is used as it is. Without
# PostgreSQL the tests that need it skip: start_postgres says so and succeeds. stop_postgres ends that one server.

POSTGRES_HOME=

postgres_programs() { # prints the folder of initdb and postgres
  local directory
  for directory in "$(dirname "$(command -v pg_ctl 2>/dev/null || echo /nowhere/pg_ctl)")" \
    /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin; do
    if [ -x "$directory/initdb" ] && [ -x "$directory/postgres" ]; then printf '%s\n' "$directory"; fi
  done | tail -n 1
}

without_postgres() { say "No PostgreSQL: the store's tests run on SQLite only ($*)."; }

as_postgres() { # the server refuses to run as root
  if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi
}

start_postgres() {
  local bin log
  if [ -n "${METACLAW_TEST_POSTGRES:-}" ]; then return 0; fi
  bin=$(postgres_programs)
  if [ -z "$bin" ] && [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    say "Installing PostgreSQL for the tests …"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql; } >/dev/null 2>&1 </dev/null ||
      say "apt-get could not install postgresql."
    bin=$(postgres_programs)
  fi
  if [ -z "$bin" ]; then without_postgres "initdb was not found"; return 0; fi
  if [ "$(id -u)" = 0 ] && ! { command -v runuser && id postgres; } >/dev/null 2>&1; then
    without_postgres "running as root, and there is no user postgres to run it as"; return 0
  fi
  POSTGRES_HOME=$(mktemp -d /tmp/metaclaw-pg.XXXXXX) # not $TMPDIR: a socket's path may have 107 bytes at most
  if [ "$(id -u)" = 0 ]; then chown postgres "$POSTGRES_HOME"; fi
  log=$POSTGRES_HOME/log
  if ! (
    cd "$POSTGRES_HOME"
    as_postgres "$bin/initdb" -D "$POSTGRES_HOME/data" -U metaclaw --auth=trust --encoding=UTF8 --no-locale --no-sync \
      >"$log" 2>&1 &&
      as_postgres "$bin/pg_ctl" -D "$POSTGRES_HOME/data" -l "$POSTGRES_HOME/server.log" -w -t 30 start \
        -o "-k '$POSTGRES_HOME' -c listen_addresses='' -c fsync=off -c synchronous_commit=off" >>"$log" 2>&1
  ) </dev/null; then
    without_postgres "it did not start: $(cat "$log" "$POSTGRES_HOME/server.log" 2>/dev/null | tail -n 3)"
    stop_postgres
    return 0
  fi
  export METACLAW_TEST_POSTGRES="postgresql+psycopg://metaclaw@/postgres?host=$POSTGRES_HOME"
}

stop_postgres() {
  local pid
  if [ -z "$POSTGRES_HOME" ]; then return 0; fi
  if pid=$(head -n 1 "$POSTGRES_HOME/data/postmaster.pid" 2>/dev/null); then
    kill -QUIT "$pid" 2>/dev/null || true # at once: nothing in it is worth a checkpoint
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  fi
  rm -rf "$POSTGRES_HOME"
  POSTGRES_HOME=
}
