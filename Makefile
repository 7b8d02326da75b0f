# SPDX-License-Identifier: Apache-2.0
# make demo     a guest survives the power cut of its host, in a lab of two emulated Xen hosts
# make check    lint, types, documents, speed, unit, property and lab tests; ends with "N passed, N failed";
#               CHECK=lab-long: the lab tests that take hours
# make lint     lint and types only
# make bench    Kemari beside xl remus in the lab, some hours; QUICK=1: under 15 minutes;
#               docs/performance.md
# make bench-micro   speed of the page loops on this machine: docs/performance.md
# make bench-disk    disks in the lab's guest: raw, by our way, protected: docs/performance.md
# make fuzz     the page loops under the sanitizers, on random and damaged batches, a few minutes
# make prove    every fault at every point, random schedules, broken rules: docs/proof.md; LAB=0: no Xen
# make soak     50 power cuts in a row under load on network, memory and disk: docs/proof.md
# make docs     whether what the documents refer to is there
# make lab-up   the lab alone, for trying things out; `vagrant/lab --help` has the rest
# make lab-down
# Whatever is missing is installed: Debian packages by root, Python packages into .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
# Further words, as in: make demo DEMO="--suite trixie --cuts 2", make check CHECK="lint unit"
DEMO ?=
CHECK ?=
LAB ?=
BENCH ?=
QUICK ?=
PROVE ?=
SOAK ?=
FUZZ_ROUNDS ?= 200000
FUZZ_SEED ?= 1

.PHONY: demo check lint prove soak docs bench bench-micro bench-disk fuzz lab-up lab-down packages \
	clean
.DEFAULT_GOAL := check

packages:
	@.ci/packages $(PYTHON)

$(STAMP): setup.cfg setup.py pyproject.toml checkpoint/_native.c checkpoint/*.h \
		checkpoint/xen/*.h diskbuffer/*.c diskbuffer/*.h | packages
	@echo "making $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check setuptools wheel
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		--editable '.[test]'
	@touch $@

demo: $(STAMP)
	@$(RUN) vagrant/demo $(DEMO)

check: $(STAMP)
	@$(RUN) .ci/check.py $(CHECK)

lint: $(STAMP)
	@$(RUN) .ci/check.py lint format types

bench: $(STAMP)
	@$(RUN) bench/comparison.py $(if $(filter-out 0,$(QUICK)),--quick) $(BENCH)

bench-micro: $(STAMP)
	@$(RUN) bench/micro.py $(BENCH)

bench-disk: $(STAMP)
	@$(RUN) bench/guest_disk.py $(BENCH)

fuzz: $(STAMP)
	@PAGES_FUZZ_ROUNDS=$(FUZZ_ROUNDS) PAGES_FUZZ_SEED=$(FUZZ_SEED) \
		$(RUN) -m pytest -q tests/property/test_native_sanitized.py

prove: $(STAMP)
	@$(RUN) -m tests.prove $(if $(filter 0,$(LAB)),,--lab) $(PROVE)

soak: $(STAMP)
	@$(RUN) vagrant/soak $(SOAK)

docs: $(STAMP)
	@$(RUN) .ci/check.py docs

lab-up: $(STAMP)
	@$(RUN) vagrant/lab up $(LAB)

lab-down:
	@$(PYTHON) vagrant/lab down

clean:
	rm -rf $(VENV) build out *.egg-info
