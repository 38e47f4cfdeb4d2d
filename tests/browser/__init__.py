"""Drives JupyterLab in Chromium; see conftest.py for the fixtures."""
