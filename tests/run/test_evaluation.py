"""Data of an evaluator's own that a run cannot evaluate is refused before anything is written."""

import dataclasses

import pytest

from jaxscale.models.execution import ByChunk
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.run.evaluation import check_data
from jaxscale.types import InputError
from tests.run.runs import load_run, train

CHUNKS = """
include '{file}'
run.ExecutionConfig.strategy = @run.FullyPipelined()
run.FullyPipelined.chunk_tokens = 16
run.FullyPipelined.num_pieces = 1
run.MeshConfig.sequence = 2
run.MeshConfig.tensor = 1
run.BitsPerByte.data = @evaluated/run.DataConfig()
evaluated/run.DataConfig.sequence_length = {length}
"""


# 18 tokens are one chunk and two more, 4 are less than one.
@pytest.mark.parametrize(
    ("length", "nearest"), [(24, "16 or 32"), (18, "16 or 32"), (4, "16")], ids=str
)
def test_a_length_that_chunks_do_not_divide_is_refused_before_the_first_step(
    gin_file, tmp_path, length, nearest
):
    file = tmp_path / "chunks.gin"
    begin = "from __gin__ import dynamic_registration\nfrom jaxscale import run\n"
    file.write_text(begin + CHUNKS.format(file=gin_file, length=length))
    message = (
        rf"DataConfig.sequence_length of BitsPerByte: given {length}, expected sequence_length % "
        rf"chunk_tokens == 0, here {length} % 16 = {length % 16}; nearest: {nearest}$"
    )
    with pytest.raises(InputError, match=message):
        train(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


IN_CHUNKS = FullyPipelined(chunk_tokens=8, num_pieces=1)


@pytest.mark.parametrize(
    ("mesh", "execution", "data", "message"),
    [
        (
            dict(sequence=2, tensor=2),
            dict(num_loss_chunks=4),
            dict(sequence_length=24),
            r"% \(sequence \* tensor \* num_loss_chunks\) == 0, here 24 % \(2 \* 2 \* 4\) = 8; "
            "nearest: 16 or 32",
        ),
        (
            dict(sequence=4, ring=4),
            dict(),
            dict(sequence_length=28),
            r"% \(2 \* ring\) == 0, here 28 % \(2 \* 4\) = 4; nearest: 24 or 32",
        ),
        (
            dict(sequence=2),
            dict(strategy=ByChunk(8)),
            dict(sequence_length=24),
            r"% \(sequence \* num_chunks\) == 0, here 24 % \(2 \* 8\) = 8; nearest: 16 or 32",
        ),
        # What the loss divides and what the chunks divide hold together: 8 alone would not do.
        (
            dict(sequence=2),
            dict(strategy=IN_CHUNKS, num_loss_chunks=8),
            dict(sequence_length=12),
            r"num_loss_chunks\) == 0, here 12 % \(2 \* 1 \* 8\) = 12; nearest: 16",
        ),
        (dict(), dict(), dict(sequence_length=64), "sequence_length <= max_length = 32"),
        (dict(), dict(attention="chunked"), dict(), "ExecutionConfig.attention: given 'chunked'"),
        (
            dict(data=4, expert=2),
            dict(),
            dict(batch_size=4),
            r"batch_size of .* % \(data \* expert\) == 0, here 4 % \(4 \* 2\) = 4; nearest: 8",
        ),
        (
            dict(tensor=2),
            dict(strategy=IN_CHUNKS),
            dict(batch_size=2),
            r"DataConfig.batch_size of PreferenceAccuracy: given 2, expected batch_size == .* 1",
        ),
    ],
    ids=["loss", "ring", "parts", "together", "length", "attention", "batch", "rows"],
)
def test_the_equation_that_an_evaluators_data_fails_is_told(
    gin_file, mesh, execution, data, message
):
    run = load_run(gin_file, "unused")
    run = dataclasses.replace(
        run,
        mesh=MeshConfig(**mesh),
        execution=dataclasses.replace(run.execution, **execution),
        evaluators={},
    )
    changed = dataclasses.replace(run.data, **data)
    with pytest.raises(InputError, match=message):
        check_data(run, "PreferenceAccuracy", changed)
