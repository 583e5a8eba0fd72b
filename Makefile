# What a developer and CI do here, each in one word. `make` lists the words.

GO        ?= go
BIN       := bin/rootless-ovl
PROGRAMS  := rootless-ovl rootless-ovl-plugin
PACKAGES  := ./...
UNIT      := $$($(GO) list ./... | grep -v '/test')
FUZZTIME  ?= 30s
SOAK      ?= 1h
SEED      ?= 0
# The tests on simulated hosts mostly wait: more of them at a time than there are cores.
SIDE      := -parallel 4
# Git in a checkout of another user too (sudo make demo): it only reads the version.
GIT       := git -c safe.directory='*'
VERSION   ?= $(shell $(GIT) describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT    ?= $(shell $(GIT) rev-parse HEAD 2>/dev/null)
LDFLAGS   := -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)
LINT_VERSION := v2.15.0
LINT      := github.com/golangci/golangci-lint/v2/cmd/golangci-lint

# The commands that the tests run (command:package), with the Debian packages that have them.
NEEDS     := etcd:etcd-server unshare:util-linux ip:iproute2

export CGO_ENABLED ?= 0
# The same flags for build, vet and test, so that nothing is compiled twice. The version comes from LDFLAGS: go's own stamp fails in a
# checkout of another user.
export GOFLAGS := $(GOFLAGS) -trimpath -buildvcs=false

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the static binaries: bin/rootless-ovl, and bin/rootless-ovl-plugin which engines start
	$(GO) build -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

.PHONY: cross
cross: ## build for arm64 too
	for program in $(PROGRAMS); do \
		GOARCH=arm64 $(GO) build -ldflags '$(LDFLAGS)' -o bin/$$program-arm64 ./cmd/$$program || exit 1; \
	done

.PHONY: release
release: ## the files of a release, which the GitHub action downloads: bin/release
	rm -rf bin/release
	for arch in amd64 arm64; do for program in $(PROGRAMS); do \
		GOARCH=$$arch $(GO) build -ldflags '$(LDFLAGS)' -o bin/release/$$program-linux-$$arch ./cmd/$$program || exit 1; \
	done; done
	cd bin/release && sha256sum rootless-ovl-* > SHA256SUMS

.PHONY: test
test: check-deps build ## vet, unit tests and integration tests
	$(GO) vet $(PACKAGES)
	ROOTLESS_OVL_BIN=$(CURDIR)/$(BIN) $(GO) test -timeout 20m $(SIDE) $(TESTFLAGS) $(PACKAGES)

.PHONY: unit
unit: ## unit tests only: no namespaces, no etcd-server
	$(GO) vet $(PACKAGES)
	$(GO) test $(TESTFLAGS) $(UNIT)

.PHONY: integration
integration: check-deps build ## black-box tests on simulated hosts; TESTFLAGS='-v -run NAME' chooses
	ROOTLESS_OVL_BIN=$(CURDIR)/$(BIN) $(GO) test -count=1 -timeout 20m $(SIDE) $(TESTFLAGS) ./test/...

.PHONY: soak
soak: check-deps build ## random operations and faults on three hosts, held against a model, for an hour; SOAK=60s shortens it, SEED=7 repeats one
	@$(GO) build -o bin/soak ./test/soak
	@ROOTLESS_OVL_BIN=$(CURDIR)/$(BIN) bin/soak -for $(SOAK) -seed $(SEED)

.PHONY: interop
interop: check-deps check-interop build ## flannel's own packages against ours: store, wire, its backends on a host (needs gcc)
	cd test/interop && $(GO) vet ./... && CGO_ENABLED=1 $(GO) vet ./flanneld
	cd test/interop && ROOTLESS_OVL_BIN=$(CURDIR)/$(BIN) $(GO) test -count=1 -timeout 10m $(SIDE) $(TESTFLAGS) ./...

.PHONY: engines
engines: check-tun build engines-test ## rootless docker and podman with our node, on simulated hosts (root; their daemons are not)
	ROOTLESS_OVL_ENGINES=1 ROOTLESS_OVL_BIN=$(CURDIR)/$(BIN) bin/engines.test -test.timeout 8m $(patsubst -%,-test.%,$(TESTFLAGS))

.PHONY: engines-test
engines-test:
	$(GO) test -c -o bin/engines.test ./test/engines

.PHONY: gateway
gateway: check-tun check-userns build ## what containers reach beside the overlay, beside slirp4netns and pasta; ARGS='-run names -v', -scale, -write-docs
	@$(GO) build -o bin/gateway ./test/gateway
	@ROOTLESS_OVL_BIN=$(CURDIR)/$(BIN) bin/gateway $(ARGS)

.PHONY: race
race: check-race ## unit tests under the race detector (needs gcc)
	CGO_ENABLED=1 $(GO) test -race -timeout 20m $(TESTFLAGS) $(UNIT)

# Left out: what counts how many packets fit into a train, which is of less when both ends are slow.
.PHONY: race-integration
race-integration: check-deps check-race build ## black-box tests with daemons built with the race detector, outages shortened (needs gcc)
	CGO_ENABLED=1 $(GO) build -race -o bin/race/rootless-ovl ./cmd/rootless-ovl
	ROOTLESS_OVL_BIN=$(CURDIR)/$(BIN) ROOTLESS_OVL_DAEMON=$(CURDIR)/bin/race/rootless-ovl \
		$(GO) test -short -count=1 -timeout 30m $(SIDE) -skip '^TestMTU_JumboUnderlayIsUsedInFull$$' $(TESTFLAGS) ./test

# Guided by what our own packages cover: go test -fuzz counts the branches of all dependencies too, and is ten times as slow for it.
.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME (30s; 10000000x: so many executions)
	@bin=$$(mktemp -d) && trap 'rm -rf "$$bin"' EXIT && for pkg in $(UNIT); do \
		$(GO) test -c -gcflags="$$($(GO) list -m)/...=-d=libfuzzer" -o "$$bin/fuzz" $$pkg >/dev/null || exit 1; \
		[ -x "$$bin/fuzz" ] || continue; \
		for target in $$("$$bin/fuzz" -test.list '^Fuzz'); do \
			echo "fuzz $$pkg $$target"; \
			(cd "$$($(GO) list -f '{{.Dir}}' $$pkg)" && "$$bin/fuzz" -test.run '^$$' -test.fuzz "^$$target\$$" -test.fuzztime $(FUZZTIME) \
				-test.fuzzminimizetime 10x -test.fuzzcachedir "$$($(GO) env GOCACHE)/fuzz/$$pkg") || exit 1; \
		done; \
		rm "$$bin/fuzz"; \
	done

.PHONY: lint
lint: ## golangci-lint, as .golangci.yml says
	@if golangci-lint version 2>/dev/null | grep -qF '$(LINT_VERSION:v%=%)'; then \
		lint=golangci-lint; \
	else \
		lint='$(GO) run $(LINT)@$(LINT_VERSION)'; \
	fi; \
	$$lint run $(PACKAGES) && cd test/interop && $$lint run ./...

.PHONY: fmt
fmt: ## format the code
	gofmt -w $$(git ls-files '*.go')

.PHONY: check
check: ## what must be clean before a commit: format, vet, lint, unit tests
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo 'not formatted: make fmt'; exit 1; }
	$(MAKE) lint unit

.PHONY: demo
demo: check-tun check-userns build ## two hosts, containers on both, and what they can reach
	@$(GO) build -o bin/demo ./test/demo
	@ROOTLESS_OVL_BIN=$(CURDIR)/$(BIN) bin/demo

.PHONY: bench
bench: build ## measure beside what we compete with (root); ROWS=overlay-tcp UNDERLAY=nic-like ROUNDS=3 ARGS=-write-docs
	@$(GO) build -trimpath -o bin/bench ./test/bench
	@bin/bench -commit "$$($(GIT) describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)" -rows '$(ROWS)' -underlay '$(UNDERLAY)' -rounds '$(or $(ROUNDS),3)' $(ARGS)

.PHONY: clean
clean: ## remove what was built
	rm -rf bin

.PHONY: check-deps
check-deps: check-tun check-userns ## name what is missing to run the tests
	@missing=; for need in $(NEEDS); do \
		PATH="$$PATH:/usr/sbin:/sbin" command -v "$${need%%:*}" >/dev/null || missing="$$missing $${need#*:}"; \
	done; \
	if [ -n "$$missing" ]; then \
		echo "missing Debian packages:$$missing"; \
		echo "install them with: sudo apt-get install$$missing"; exit 1; \
	fi

.PHONY: check-tun
check-tun:
	@test -r /dev/net/tun -a -w /dev/net/tun || { \
		echo "/dev/net/tun is missing or closed to $$(id -un): sudo modprobe tun; sudo chmod 666 /dev/net/tun"; exit 1; }

# Root gives up root in the tests and the demo, which say themselves where the user cannot make namespaces.
.PHONY: check-userns
check-userns:
	@test "$$(id -u)" = 0 || ! command -v unshare >/dev/null || unshare -Urn true || { \
		echo "$$(id -un) cannot make user namespaces; as root set what is in the way:"; \
		echo "  sysctl user.max_user_namespaces user.max_net_namespaces       # 0: sudo sysctl -w NAME=15000"; \
		echo "  sysctl kernel.unprivileged_userns_clone                       # 0: sudo sysctl -w NAME=1"; \
		echo "  sysctl kernel.apparmor_restrict_unprivileged_userns           # 1: sudo sysctl -w NAME=0"; exit 1; }

.PHONY: check-interop
check-interop:
	@command -v gcc >/dev/null || { echo "flannel's udp backend is C and needs gcc: sudo apt-get install gcc libc6-dev"; exit 1; }

.PHONY: check-race
check-race:
	@command -v gcc >/dev/null || { echo 'the race detector needs gcc: sudo apt-get install gcc libc6-dev'; exit 1; }
