# Sourced by launch/demo.sh and tests/run.sh.

# Activate .venv, made if missing, unless a virtual environment is active; install the requirement files given.
use_environment() {
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
  fi
  local requirements installed
  for requirements in "$@"; do
    # A copy of the file in the environment shows that it has been installed.
    installed=$VIRTUAL_ENV/installed-${requirements//\//-}
    if ! cmp -s "$requirements" "$installed"; then
      echo "installing $requirements into $VIRTUAL_ENV (once, some minutes)"
      python -m pip install --quiet --disable-pip-version-check -r "$requirements"
      cp "$requirements" "$installed"
    fi
  done
}
