"""How much is measured: block sizes, layer shapes, samples. No torch here."""

from dataclasses import dataclass

from offload_rt.profiling.profile import LayerShape

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a measurement does; the defaults need one to two minutes on two cores.

    Attributes:
        idle: nothing else computes: threads wait as they do in runs, and the typical run counts.
        least_samples: of each number, however long they are.
        most_samples: of each number.
        scattered_samples: of each number whose samples lie apart beside other work: that comes and
            goes in seconds, so more of them find it gone.
        number_s: no further sample of a number is begun after that; twice that where they lie apart
            beside other work.
        again_s: for measuring the implausible times of a curve again.
        link_blocks: sizes of copies to and from a GPU.
        link_sample_bytes: a sample copies a block until these bytes have crossed.
        disk_depths: reads in flight.
        disk_file_bytes: size of the temporary file, where no model is given.
        disk_sample_bytes: read in one sample.
        memory_bytes: host memory that is read or copied.
        pin_bytes: host memory that is page-locked at once; less where that is refused.
        pin_most_bytes: what is locked together to see whether there is a limit, at most.
        shapes: hidden, intermediate, heads, KV heads, head size of the layers that are timed.
        cold_bytes: of all copies of a layer that are used in turn, at least, so that no cache
            holds their weights.
        caches: times the bytes of the largest cache that are cold, where that is more: of experts
            and of weights that are dequantised; of layers that are not rounded, their KV and heads
            no more than a model has together. A cache drops lines in no strict order: at twice its
            bytes a layer took 0.86 of what it takes in a model
            (docs/RESULTS.md, "Profiles of threads that sleep").
        compute_sample_s: a sample repeats a pass until that is over.
        tokens: in a pass through a layer.
        packed_tokens: in a step of a draft model.
        recorded_tokens: in a recorded pass.
        heads: hidden size and vocabulary of the output heads that are timed.
        head_rows: rows that go through them.
        experts: hidden and intermediate size of the experts that are timed.
        expert_rows: that each of them is sent.
        beside_disk: the shapes that are timed while the disk is read, from this to before that one.
        beside_tokens: in these passes.
        beside_read_bytes: of one copy from the disk meanwhile.
        beside_sample_s: a sample of these repeats a pass until that is over.
        kv_bytes: keys and values of a layer that are attended to.
        query_tokens: rows that attend to them.
        dequantised_side: rows and columns of the weights that are dequantised.
    """

    idle: bool = False
    least_samples: int = 3
    most_samples: int = 5
    scattered_samples: int = 40
    number_s: float = 0.5
    again_s: float = 8.0
    link_blocks: tuple[int, ...] = (64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
    link_sample_bytes: int = 256 * MIB
    disk_depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    disk_file_bytes: int = GIB
    disk_sample_bytes: int = 256 * MIB
    memory_bytes: int = 256 * MIB
    pin_bytes: int = GIB
    pin_most_bytes: int = 8 * GIB
    # One that is little more than its kernels' starts, then layers of SmolLM2-135M, Qwen2.5-0.5B,
    # Llama-3.2-1B and Llama-3.1-8B: draft models', targets'.
    shapes: tuple[tuple[int, int, int, int, int], ...] = (
        (256, 704, 4, 2, 64),
        (576, 1536, 9, 3, 64),
        (896, 4864, 14, 2, 64),
        (2048, 8192, 32, 8, 64),
        (4096, 14336, 32, 8, 128),
    )
    cold_bytes: int = 256 * MIB
    caches: int = 6
    compute_sample_s: float = 0.02
    tokens: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    # Above 8 rows, of 8-bit weights above 32, other kernels compute (`kernels/layers.py`).
    packed_tokens: tuple[int, ...] = (1, 2, 4, 8, 9, 16, 32, 33, 64)
    recorded_tokens: tuple[int, ...] = (1, 8, 32)
    # Heads of SmolLM2-135M, Qwen2.5-0.5B and Llama-3.2-1B.
    heads: tuple[tuple[int, int], ...] = ((576, 49152), (896, 151936), (2048, 128256))
    head_rows: tuple[int, ...] = (1, 8, 9, 64)
    # One that is little more than its kernels' starts, then experts of a SmolLM2-135M that was made
    # a mixture, and of DeepSeek-V2-Lite.
    experts: tuple[tuple[int, int], ...] = ((256, 704), (576, 1536), (2048, 1408))
    # Above 32 rows torch multiplies in passes that need not be row-invariant (`AT_ONCE_FEW`).
    expert_rows: tuple[int, ...] = (1, 16, 32, 33, 64)
    beside_disk: tuple[int, int] = (2, 4)
    beside_tokens: tuple[int, ...] = (1, 8)
    beside_read_bytes: int = 32 * MIB
    beside_sample_s: float = 0.1
    kv_bytes: int = 64 * MIB
    query_tokens: tuple[int, ...] = (1, 16, 64)
    dequantised_side: int = 4096  # of a 7B model's matrix

    def layer_shapes(self, dtype: str, itemsize: int) -> tuple[LayerShape, ...]:
        """The layers that are timed, in a number format of `itemsize` bytes."""
        made = []
        for hidden, intermediate, heads, kv_heads, head_dim in self.shapes:
            weights = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * intermediate
            made.append(
                LayerShape(
                    hidden=hidden,
                    intermediate=intermediate,
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    dtype=dtype,
                    weight_bytes=weights * itemsize,
                )
            )
        return tuple(made)
