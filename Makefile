PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: lab test check bench soak setup

setup:
	@echo setup
