"""The memory format that strides suggest, against PyTorch's own answer."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_fast.layout import memory_format


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    channels_last=st.booleans(),
    order=st.permutations(range(4)),
    step=st.integers(1, 2),
    expanded=st.booleans(),
)
def test_as_pytorch_says(shape, channels_last, order, step, expanded):
    x = torch.empty(shape)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        x = x[:, :, ::step].permute(*order)
        x = x.expand(3, -1, -1, -1) if expanded and x.shape[0] == 1 else x
    if x.dim() == 5:  # the package has no 3-D convolution
        assert memory_format(x) == torch.contiguous_format
    else:
        assert memory_format(x) == torch._prims_common.suggest_memory_format(x)
