"""How far a layer of a residual block is fused in training: its stage.

    1  LIBRARY   the library's convolution; batch norm, ReLU and residual in fused passes
    2  EPILOGUE  the convolution's own kernel sums up its statistics; stride-1 gradients through the forward kernel
    3  PROLOGUE  a 1x1 convolution applies the batch norm and ReLU before it as it reads, so that they are never written
    4  GRAM      an expanding 1x1 takes its statistics from its input's covariance; its raw output is never stored

A stage is the most that may be fused: a layer that a stage does not fit takes the highest below it that does.
"""

LIBRARY, EPILOGUE, PROLOGUE, GRAM = 1, 2, 3, 4
STAGES = (LIBRARY, EPILOGUE, PROLOGUE, GRAM)
