# Sourced by the demo and the tests.

# Makes .venv, unless a virtual environment is active already, and installs the requirement files named.
use_environment() {
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
  fi
  unset PYTHONDONTWRITEBYTECODE
  local requirements installed
  for requirements in "$@"; do
    # A copy of the list is left in the environment, so that an unchanged list costs nothing the next time.
    installed=$VIRTUAL_ENV/installed-${requirements//\//-}
    if ! cmp -s "$requirements" "$installed"; then
      echo "installing $requirements into $VIRTUAL_ENV (once, some minutes)"
      # Python compiles a module when it is first imported, which most of these never are, and keeps it if it may.
      python -m pip install --quiet --disable-pip-version-check --no-compile -r "$requirements"
      cp "$requirements" "$installed"
    fi
  done
}
