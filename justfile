# People and CI run the same recipes. `just` alone lists them.

set shell := ["bash", "-euo", "pipefail", "-c"]

# Lists the recipes.
[private]
default:
    @just --list --unsorted

# All checks before a change lands: format, lints, features, docs, core's dependencies, tests on all engines.
check: fmt lint features doc core-tree test integration-test

# Checks that the code is formatted; `cargo fmt --all` formats it.
fmt:
    cargo fmt --all --check

# Clippy, no warning allowed.
lint:
    cargo clippy --locked --workspace --all-targets --all-features -- -D warnings

# Builds the documentation; a warning or a broken link is an error. `just doc --open` shows it.
doc *args:
    RUSTDOCFLAGS="-D warnings" cargo doc --locked -p 'evercore-*' --all-features --no-deps {{ args }}

# Checks that core has no dependency.
core-tree:
    #!/usr/bin/env bash
    set -euo pipefail
    tree=$(cargo tree --locked -p evercore-core -e normal)
    echo "$tree"
    [ "$(wc -l <<<"$tree")" = 1 ] || { echo "evercore-core must have no dependency without a feature" >&2; exit 1; }

# Builds each feature of each crate alone, and no feature, and the default ones; a warning is an error.
features:
    #!/usr/bin/env bash
    set -euo pipefail
    for manifest in evercore-*/Cargo.toml; do
        crate=${manifest%/*}
        lint() { echo "== $crate $*"; cargo clippy --quiet --locked -p "$crate" "$@" -- -D warnings; }
        lint
        lint --no-default-features
        for feature in $(sed -n '/^\[features\]/,/^\[[^f]/s/^\([a-z_]*\) = .*/\1/p' "$manifest"); do
            [ "$feature" = default ] || lint --no-default-features --features "$feature"
        done
    done

# Builds the published crates with the oldest Rust that Cargo.toml allows.
msrv:
    #!/usr/bin/env bash
    set -euo pipefail
    version=$(sed -n 's/^rust-version = "\([^"]*\)".*/\1/p' Cargo.toml)
    rustup run "$version" cargo --version >/dev/null 2>&1 || {
        echo "Rust $version is missing: rustup toolchain install $version --profile minimal" >&2
        exit 1
    }
    RUSTUP_TOOLCHAIN="$version" cargo check --locked -p 'evercore-*' --all-features --target-dir target/msrv

# Checks the dependencies by deny.toml: licences, sources, advisories, duplicates. `just deny licenses` checks one.
deny *args:
    @scripts/cargo-tool deny
    cargo deny --locked check {{ args }}

# Compares the public interface with the last release; a break without a new version is an error.
semver:
    #!/usr/bin/env bash
    set -euo pipefail
    tag=$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null) || {
        echo "there is no tag of a release (v0.1.0) yet: nothing to compare with"
        exit 0
    }
    scripts/cargo-tool semver-checks
    echo "== compared with $tag"
    cargo semver-checks --workspace --baseline-rev "$tag"

# Many tests wait more than they compute, so two run per core.

# All tests; those on PostgreSQL start servers of their own. Arguments go to cargo: `just test -p evercore-memory`.
test *args:
    RUST_TEST_THREADS="${RUST_TEST_THREADS:-$((2 * {{ num_cpus() }}))}" cargo test --locked {{ if args == "" { "--workspace --all-features" } else { args } }}

# The conformance suite on every engine, all cases in all ways, and the examples.
integration-test: integration-test-memory integration-test-sqlite integration-test-postgres integration-test-examples

# The conformance suite and the other tests of the memory engine.
integration-test-memory:
    EVERCORE_CASES=all EVERCORE_REQUIRE=memory cargo test --locked -p evercore-memory --all-features --tests

# The conformance suite and the other tests of the SQLite engine.
integration-test-sqlite:
    EVERCORE_CASES=all EVERCORE_REQUIRE=sqlite cargo test --locked -p evercore-sqlite --all-features --tests

# The conformance suite and the other tests of the PostgreSQL engine, on servers of its own or on EVERCORE_POSTGRES_URL.
integration-test-postgres:
    EVERCORE_CASES=all EVERCORE_REQUIRE=postgres cargo test --locked -p evercore-postgres --all-features --tests

# The tests of the packages in examples/.
integration-test-examples:
    EVERCORE_REQUIRE=memory,sqlite,postgres cargo test --locked --workspace --exclude 'evercore-*' --exclude benches --all-features --tests

# Builds everything and runs the tests that need no PostgreSQL server, as on macOS and Windows.
test-portable:
    cargo build --locked --workspace --all-features
    EVERCORE_REQUIRE=memory,sqlite cargo test --locked -p evercore-memory -p evercore-sqlite -p evercore-testkit --all-features

# Long runs: random walks, killed writers, and PostgreSQL under 64 writers with crashes and cut connections.
torture steps="20000" kills="20" seed=`echo $RANDOM`:
    EVERCORE_STEPS={{ steps }} EVERCORE_KILLS={{ kills }} EVERCORE_SEED={{ seed }} EVERCORE_REQUIRE=memory,sqlite \
        cargo test --locked --release -p evercore-memory -p evercore-sqlite -p loan_applications -p projection \
        --all-features --tests -- --include-ignored
    just torture-testkit
    just torture-sqlite
    just torture-postgres {{ steps }} {{ seed }}

# All cases on every engine that is broken on purpose; the table says which must fail. About a minute after the build.
torture-testkit:
    EVERCORE_TORTURE=full cargo test --locked --release -p evercore-testkit --test self_check

# The long runs on SQLite, with their counts. EVERCORE_LOAN_LOG names the loan log, if you have it.
torture-sqlite:
    EVERCORE_TORTURE=full EVERCORE_REQUIRE=sqlite,faketime \
        cargo test --locked --release -p evercore-sqlite --all-features --test torture -- --nocapture --test-threads=1
    EVERCORE_TORTURE=full EVERCORE_REQUIRE=sqlite \
        cargo test --locked --release -p loan_applications -- --nocapture live

# The long runs on PostgreSQL alone.
torture-postgres steps="20000" seed=`echo $RANDOM`:
    EVERCORE_STEPS={{ steps }} EVERCORE_SEED={{ seed }} EVERCORE_REQUIRE=postgres \
        cargo test --locked --release -p evercore-postgres --all-features --test conformance -- direct::random
    EVERCORE_TORTURE=full EVERCORE_REQUIRE=postgres,faketime \
        cargo test --locked --release -p evercore-postgres --all-features --test torture -- --nocapture --test-threads=1
    EVERCORE_TORTURE=full EVERCORE_REQUIRE=postgres \
        cargo test --locked --release -p postgres_loan_applications -- --nocapture

# The benchmarks, each compared with its floor. Arguments choose among them: `just bench W3`.
bench *args: (bench-sqlite args) (bench-postgres args)

# The benchmarks on SQLite and in memory.
bench-sqlite *args:
    cargo bench --locked -p benches --bench sqlite -- {{ args }}

# The benchmarks on PostgreSQL, on a server that they start.
bench-postgres *args:
    cargo bench --locked -p benches --bench postgres -- {{ args }}

# The cost of `record`, which decodes every event that it encodes.
bench-record:
    cargo bench --locked -p benches --bench recording

# Copies the licences, docs/ and migrations/ into the crates whose packages need them; a test compares them.
copies:
    scripts/renew-copies

# Runs scratch/src/main.rs, a private playground that git ignores; created on first use.
scratch *args:
    #!/usr/bin/env bash
    set -euo pipefail
    [ -e scratch/Cargo.toml ] || scripts/make-scratch
    cargo run --manifest-path scratch/Cargo.toml --target-dir target -- {{ args }}

# Cargo assumes that a version in a registry never changes, even in the temporary registry of `cargo package`. So
# unpacked and built files of earlier runs are removed first.

# Packs every published crate, and builds it from its package.
package *args:
    rm -rf target/packaging/package "${CARGO_HOME:-$HOME/.cargo}"/registry/src/-*/evercore-*
    cargo clean --quiet --locked --workspace --target-dir target/packaging
    cargo package --locked -p 'evercore-*' --target-dir target/packaging {{ args }}
