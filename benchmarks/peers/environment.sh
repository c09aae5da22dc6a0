# Sourced by the scripts beside it: one peer's own Python environment, made anew, so that its requirements and ours never meet.
#
# PYTHON      the Python to make it with; python3 if unset. The versions pinned here were tried with 3.11.
# PIP_ARGS    what pip is told besides: an index of CPU builds of torch, for instance.

here=$(cd "$(dirname "$0")" && pwd)

begin_environment() { # NAME
    environment=$HOME/.cache/manylora/peers/$1
    rm -rf "$environment"
    mkdir -p "$environment"
    "${PYTHON:-python3}" -m venv "$environment"
}

install() { # ARGUMENTS OF `pip install`
    # shellcheck disable=SC2086
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} "$@"
}

# Last of all: an environment without this file was not finished, and the benchmark says so.
end_environment() { # WHAT WAS INSTALLED
    echo "$1" > "$environment/ready"
    echo "$environment: $1"
}
