# make demo          the stack at work on a simulated drive: out/demo/report.html
# make test          the tests, on a CPU; all but the next
# make test-loop     the whole offline loop by its commands, and two real frames learned by heart: some minutes
# make check         format, lint, types
# make .venv/robot   what runs on the vehicle: no torch
# make .venv/training  what trains, and what the tests run in
# make devkit        the nuScenes devkit as an oracle, apart because it needs numpy < 2
# make clean         remove what the demo, tests and builds wrote; the environments stay

PYTHON ?= python3
ARGUMENTS ?=
.DEFAULT_GOAL := demo
.PHONY: demo test test-loop check docs clean devkit machine .venv/robot .venv/training .venv/devkit
# The ROS wheels mark a process they have prepared; an environment that is being built must start unmarked.
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE

NODE_TESTS := tests/ros tests/end_to_end
INTERFACES := src/occbev/ros/build_interfaces.py $(wildcard src/occbev/messages/interfaces/*/*/*)
# With a sourced ROS 2 distribution its rclpy is used and no ROS wheel is installed.
COMMA := ,
ROS_EXTRA := $(if $(AMENT_PREFIX_PATH),,$(COMMA)ros)
VENV_OPTIONS := $(if $(AMENT_PREFIX_PATH),--system-site-packages)
# The distribution's messages are compiled against its NumPy: no later major version comes over it.
NEXT_NUMPY = $(shell $(PYTHON) -c 'import numpy; print(int(numpy.__version__.split(".")[0]) + 1)')
NUMPY = $(if $(AMENT_PREFIX_PATH),'numpy<$(NEXT_NUMPY)')
# An environment is up to date when the contents of these files are those it was made from.
stamp = $(shell { cat setup.py training/pyproject.toml Makefile $(INTERFACES); echo "$(AMENT_PREFIX_PATH)"; } | cksum | cut -d' ' -f1)
STAMP := $(stamp)

demo: .venv/robot
	.venv/robot/bin/occbev demo $(ARGUMENTS)

test: .venv/robot .venv/training
ifeq ($(ARGUMENTS),)
	@# Tests of nodes wait for clocks, so they have the machine to themselves; the others share its cores.
	.venv/training/bin/python -m pytest $(NODE_TESTS)
	.venv/training/bin/python -m pytest -n 2 --dist loadfile tests $(NODE_TESTS:%=--ignore=%)
else
	.venv/training/bin/python -m pytest $(ARGUMENTS)
endif

test-loop: .venv/training
	OCCBEV_LONG_TESTS=1 .venv/training/bin/python -m pytest tests/end_to_end/test_training_loop.py tests/end_to_end/test_overfit.py

check: .venv/training
	.venv/training/bin/ruff format --check . && .venv/training/bin/ruff check . && .venv/training/bin/mypy

docs: .venv/robot
	.venv/robot/bin/python -m occbev.streams.reference docs/topics-and-parameters.md

.venv/robot: .venv/robot/.made-$(STAMP)
.venv/training: .venv/training/.made-$(STAMP)
.venv/devkit devkit: .venv/devkit/.made-$(STAMP)

.venv/robot/.made-$(STAMP): | machine
	@$(call make_environment,robot,-e '.[robot$(COMMA)demo$(ROS_EXTRA)]')
	@# The simulator and the metrics need nothing of what training depends on.
	@.venv/robot/bin/python -m pip install --quiet --no-deps -e training
	@.venv/robot/bin/python -m occbev.ros.build_interfaces
	@$(call made,robot)

.venv/training/.made-$(STAMP): | machine
	@$(call make_environment,training,-e '.[robot$(COMMA)demo$(ROS_EXTRA)]' -e 'training[dev]')
	@.venv/training/bin/python -m occbev.ros.build_interfaces
	@$(call made,training)

.venv/devkit/.made-$(STAMP): | machine
	@$(call make_environment,devkit,'nuscenes-devkit>=1.1.11')
	@$(call made,devkit)

define make_environment
echo "Setting up .venv/$(1) with pip ..."; mkdir -p .venv; date +%s > .venv/.began-$(1); \
.venv/$(1)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV_OPTIONS) .venv/$(1); \
.venv/$(1)/bin/python -m pip uninstall --quiet --yes occbev-training 2>/dev/null; \
.venv/$(1)/bin/python -m pip install --quiet $(2) $(NUMPY)
endef

define made
rm -f .venv/$(1)/.made-*; touch .venv/$(1)/.made-$(STAMP); \
echo ".venv/$(1) is ready after $$(( $$(date +%s) - $$(cat .venv/.began-$(1)) )) s"; rm -f .venv/.began-$(1)
endef

machine:
	@sh .ci/machine $(PYTHON)

clean:
	rm -rf out build install log dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info training/*.egg-info
