"""DRAM traffic of the authors' CUDA launches, by the rule of :mod:`.dram_model`."""

from __future__ import annotations

from spatial_mamba_d2.profiling.dram_model import Launch, Problem, scan_inputs


def authors_forward(p: Problem) -> list[Launch]:
    """The authors' launches for the same in eval mode, in float32, the only dtype they have.

    ``StructureAwareSSM.forward_core`` and ``StateFusion.forward`` of their repository; tensors are
    [B, D, H, W]. Not counted, in their favour: what the scan saves for a backward pass, the halos
    of the convolution, and the copies to and from channels-first that surround this part.
    """
    p = p._replace(element_bytes=4)
    kernel = p.accumulator("fusion kernel", 11, 11, p.dim)
    h, fused = p.activation("h"), p.activation("fused h")
    observed, skip = p.activation("C h"), p.activation("D u")
    return [
        Launch("selective_scan_fwd: u, delta, A, B, bias -> h", reads=scan_inputs(p), writes=[h]),
        Launch("DepthwiseFunction: 11 x 11, 121 taps", reads=[h, kernel], writes=[fused]),
        Launch("h * C", reads=[fused, p.per_token("C")], writes=[observed]),
        Launch("u * D", reads=[p.activation("u"), p.per_channel("D")], writes=[skip]),
        Launch("sum of both", reads=[observed, skip], writes=[p.activation("y")]),
    ]


def authors_training_forward(p: Problem) -> list[Launch]:
    """The same in training mode: three padded and dilated convolutions and their weighted sum."""
    p = p._replace(element_bytes=4)
    scan, _, *observe = authors_forward(p)
    h, kernel = p.activation("h"), p.accumulator("kernel", 9, p.dim)
    fusion = []
    for dilation in (1, 3, 5):
        height, width = p.height + 2 * dilation, p.width + 2 * dilation
        padded = p.accumulator("padded h", p.num_images, height, width, p.dim)
        convolved, weighted = p.activation("convolved h"), p.activation("weighted h")
        fusion += [
            Launch(f"replicate by {dilation}", reads=[h], writes=[padded]),
            Launch(f"3 x 3, dilation {dilation}", reads=[padded, kernel], writes=[convolved]),
            Launch(f"alpha times dilation {dilation}", reads=[convolved], writes=[weighted]),
        ]
    weighted = p.activation("weighted h")
    sums = [Launch("sum of two", reads=[weighted, weighted], writes=[p.activation("fused h")])] * 2
    return [scan, *fusion, *sums, *observe]
