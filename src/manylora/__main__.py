"""`python -m manylora` is `manylora`."""

from manylora.cli import main

main()
