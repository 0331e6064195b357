"""--memory-budget: the chunk that it allows, by hand, and what it refuses."""

import shlex
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
from support.runs import foreign_flags

from fbpc_ray.commands import main
from fbpc_ray.core import memory
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.execution import memory_budget, memory_estimate, session, validation
from fbpc_ray.execution.memory_estimate import NetworkSize, Problem

PROBLEM = Problem(images=50_000, coreset=5000, pixels=3072, classes=100, networks=[NetworkSize(1000, 500_000)])
SETTINGS = {"batch_size": 5000, "mc_samples": 30, "posterior_steps": 30, "chain_epochs": 1000, "chain_every": 100}
PASS_BYTES = 8 * 500_000
FIXED = (
    7e8 + 2 * 50_000 * 3072 + 4 * 3072 * (8 * 5000 + 12 * 5000 + 4 * 256) + 8 * 4 * 30 * 5000 * 100
    + (7 + 31) * 4 * 1000
)  # fmt: skip


def chunk(budget: str, problem: Problem = PROBLEM, **settings) -> int:
    config = Config().updated(**(SETTINGS | settings), memory_budget=budget)
    return memory_budget.chunk_images(config, problem, distils=True)


@pytest.mark.parametrize(
    ("text", "size"), [("6GB", 6e9), ("800 MB", 8e8), ("1.5gb", 1.5e9), ("2e9", 2e9), ("1e6B", 1e6), ("3TB", 3e12)]
)
def test_sizes(text, size):
    assert memory_budget.parse_size(text) == size


@pytest.mark.parametrize("text", ["six", "6 G B", "-6GB", "6GiB", "0", "1KB", "1e40", "nan", "6GB 7GB"])
def test_other_text_is_refused(text):
    with pytest.raises(UserError, match=r"^--memory-budget: must be a size such as 6GB or 800MB, got "):
        validation.check(Config().updated(memory_budget=text))


def test_the_chunk_by_hand():
    """What the fixed part leaves of the budget, in images; all chunks of the batch equal where a divisor is near."""
    limit = 1111
    budget = FIXED + PASS_BYTES * (limit + 0.5)
    assert chunk(f"{budget:.0f}") == 1000
    assert chunk(f"{budget:.0f}", batch_size=4999) == limit, "a prime has no divisor"
    assert chunk(f"{FIXED + PASS_BYTES * 1700.5:.0f}") == 1250, "three parts are not equal, four are"
    assert chunk(f"{FIXED + PASS_BYTES * 10_000:.0f}") == 5000, "all at once"


def test_more_memory_never_means_smaller_chunks():
    sizes = [chunk(f"{FIXED + PASS_BYTES * images:.0f}") for images in range(2, 6000, 97)]
    assert all(one <= 2 * other for one, other in pairwise(sizes))
    assert sizes[-1] == 5000


def test_chains_alone_have_no_batches_of_a_step():
    config = Config().updated(memory_budget="4GB", chain_full_batch=500)
    small = replace(PROBLEM, coreset=300)
    assert memory_budget.chunk_images(config, small, distils=False) == 300
    assert memory_budget.chunk_images(config, PROBLEM, distils=False) == config.evaluation.chain_batch_size


def test_views_and_posterior_samples_count():
    """Eight more copies of the batch, whose size is a prime; ten samples of a chain, beside seven of a network."""
    fixed = (
        7e8 + 2 * 50_000 * 3072 + 4 * 3072 * (8 * 5000 + (12 + 8) * 4999 + 4 * 256) + 8 * 4 * 30 * 4999 * 100
        + (7 + 31) * 4 * 1000
    )  # fmt: skip
    assert chunk(f"{fixed + PASS_BYTES * 1111.5:.0f}", batch_size=4999, views=8) == 1111
    fixed = 7e8 + 2 * 50_000 * 3072 + 4 * 3072 * 8 * 5000 + (7 + 10) * 4e6
    config = Config().updated(**SETTINGS, memory_budget=f"{fixed + PASS_BYTES * 100.5:.0f}")
    large = replace(PROBLEM, networks=[NetworkSize(1_000_000, 500_000)])
    assert memory_budget.chunk_images(config, large, distils=False) == 100


def test_the_largest_network_and_the_part_that_needs_most_count():
    """Of two networks the most parameters and the most activations; of the parts a chain that keeps 4,000 samples."""
    two = replace(PROBLEM, networks=[NetworkSize(1_000_000, 250_000), NetworkSize(900_000, 500_000)])
    fixed = FIXED + (7 + 31) * 4 * 999_000
    assert chunk(f"{fixed + PASS_BYTES * 1000.5:.0f}", two) == 1000
    large = replace(PROBLEM, networks=[NetworkSize(1_000_000, 500_000)])
    fixed = 7e8 + 2 * 50_000 * 3072 + 4 * 3072 * 8 * 5000 + (7 + 4000) * 4e6
    samples = {"chain_epochs": 4000, "chain_every": 1}
    assert chunk(f"{fixed + PASS_BYTES * 1111.5:.0f}", large, **samples) == 1000


def test_with_room_enough_a_chunk_is_the_largest_batch_that_there_is():
    """Of ten coreset images that is the batch of real ones, or all of them."""
    assert chunk("50GB", replace(PROBLEM, coreset=10)) == 256
    assert chunk("50GB", replace(PROBLEM, coreset=10, images=100)) == 100


def test_a_budget_that_is_too_small_is_refused():
    line = (
        r"^--memory-budget 1GB: images, draws and parameters take about 2.7 GB, a pass of one image 0.1 GB more; "
        "raise the budget, or lower --ipc, --mc-samples or --width$"
    )
    with pytest.raises(UserError, match=line):
        chunk("1GB")
    with pytest.raises(UserError, match=r"raise the budget, or lower --width$"):
        memory_budget.chunk_images(Config().updated(**SETTINGS, memory_budget="1GB"), PROBLEM, distils=False)


def test_the_chunk_does_not_depend_on_the_machine(small, digits, monkeypatch):
    config, sizes = small.updated(architectures=("convnet-in",), memory_budget="720MB"), set()
    for free in (1e10, 1e13):
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        sizes.add(session.open_session(config, lambda line: None, digits).config.networks.chunk_images)
    assert len(sizes) == 1


def test_what_is_recorded_stays(small, digits):
    """A run that goes on has its chunk in config.json, whatever a later estimate says."""
    config = small.updated(architectures=("convnet-in",), memory_budget="6GB", chunk_images=3)
    assert session.open_session(config, lambda line: None, digits).config.networks.chunk_images == 3


@pytest.mark.parametrize("settings", [{"memory_budget": "6GB"}, {"chunk_images": 9}])
def test_batchnorm_is_one_line(settings, small, digits):
    flag = "--memory-budget 6GB" if "memory_budget" in settings else "--chunk-images 9"
    line = f"^{flag}: convnet-bn has BatchNorm, whose statistics are those of a whole batch, not of its chunks; choose"
    with pytest.raises(UserError, match=line):
        session.open_session(small.updated(**settings), lambda line: None, digits)


def test_a_run_in_chunks_is_scored_on_batchnorm_as_a_coreset(finished_run, tmp_path, capsys):
    """`evaluate RUN` has no flags of chunks: its advice is a command that does without them."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    settings = read_config(run).updated(architectures=("convnet-in",), chunk_images=4)
    RunDirectory(run).write_config(settings)
    words = ("--architectures", "convnet-bn", "--backend", "serial", "--dry-run")
    with pytest.raises(SystemExit):
        main.main(["evaluate", str(run), *words])
    line = capsys.readouterr().err.strip()
    assert foreign_flags(line, "evaluate", words) == {"--chunk-images"}  # the cause, which the run has
    assert line.startswith("error: --chunk-images 4: convnet-bn has BatchNorm")
    advice = f"or score the coreset alone, without the run's chunks: `fbpc evaluate --coreset {run} --data digits`"
    assert line.endswith(advice)
    _, *advised = shlex.split(line.split("`")[1])
    main.main([*advised, *words])
    assert "convnet-bn" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["bpc-w", "vbpc", "frepo"])
@pytest.mark.parametrize("settings", [{"memory_budget": "6GB"}, {"chunk_images": 9}])
def test_methods_that_need_one_graph_are_one_line(method, settings):
    with pytest.raises(
        UserError, match=rf"^--\w+-\w+ \w+: the gradient of --method {method} can't be computed in chunks"
    ):
        validation.check(Config().updated(method=method, **settings))


def test_the_estimate_that_refuses_runs_knows_of_chunks():
    config = Config().updated(**SETTINGS, chunk_images=100)
    needs = {need.name: need.bytes for need in memory_estimate.distillation_needs(config, PROBLEM)}
    assert needs["passes of the pseudocoreset"] == pytest.approx(1.1 * 4 * 500_000 * 100)
    (passes, *_) = memory_estimate.evaluation_needs(config, PROBLEM)
    assert passes.bytes == pytest.approx(1.1 * 4 * 500_000 * 100)
