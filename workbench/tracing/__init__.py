"""Watching and changing a denoising run: sites, hooks, the step ledger, records and replay."""
