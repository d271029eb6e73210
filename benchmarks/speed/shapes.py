"""The parameter lists that the speed benchmarks share."""

from collections.abc import Iterator

Shape = tuple[int, ...]


def _distilgpt2() -> Iterator[Shape]:
    width = 768
    yield from [(50257, width), (1024, width)]
    for _ in range(6):
        yield from [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        yield from [
            (width,),
            (width,),
            (width, 4 * width),
            (4 * width,),
            (4 * width, width),
            (width,),
        ]
    yield from [(width,), (width,)]


GPT: list[Shape] = list(_distilgpt2())
"""distilgpt2: 76 tensors, 82M parameters."""

SMALL: list[Shape] = 25 * [(64, 64), (64,), (256, 64), (256,), (64, 256), (64,)]
"""150 tensors, 0.93M parameters."""

MATRICES: list[Shape] = 4 * [(768, 768), (768, 3072), (3072, 768)]
"""The 12 matrices of the Muon comparison."""

BLOCKS: list[Shape] = [(4096, 768), *GPT[2:50]]
"""Four blocks of distilgpt2 and 4096 rows of its embedding: 49 tensors, 31.5M parameters."""

LISTS = {"gpt": GPT, "small": SMALL, "matrices": MATRICES, "blocks": BLOCKS}
