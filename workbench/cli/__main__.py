"""``python -m workbench.cli`` is the ``workbench`` command."""

from workbench.cli.main import main

main()
