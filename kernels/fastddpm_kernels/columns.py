"""The columns of a step table: names and order, once, for the solvers, the reference and the kernels.

A row drives one model evaluation ``m = model(c_in * x, t)`` and one update of the state:

    x0  = limit(x0_x * x + x0_m * m)                     # predicted clean sample
    x'  = x_x * x + x_x0 * x0 + x_m * m + x_h1 * h1 + x_h2 * h2 + x_h3 * h3 + x_z * z
    h3' = h2;  h2' = h1;  h1' = x0                       # history, only where a solver asks for it

The limit is to [-clip, clip]; or where ``ratio`` isn't 0 that of Imagen (arXiv 2205.11487, section 2.3): with s the
ratio-quantile of the sample's abs(x0), kept within 1 ... clip, x0 = clamp(x0, -s, s) / s.

With a learned variance (Nichol & Dhariwal 2021, eq. 15) the model's output has a second half of channels, v, and the
noise's coefficient is ``x_z * 2^(s_0 + s_v * v)``. In inpainting, where the mask is set, x' is
``k_x * known + k_z * z``, with noise of a stream of its own.

And then the sample's cursor moves on by ``advance`` rows. Tables of several solvers can stand behind one another in one
device tensor, since nothing but the cursor says where a sample is. A table ends with an identity row, at which a
finished sample stays: ``x_x = 1``, ``advance = 0``.
"""

COLUMNS = (
    "t",  # the model's time input (a training time step, or what the model calls its noise level)
    "c_in",  # scale of the model's input
    "x0_x",
    "x0_m",
    "x_x",
    "x_x0",
    "x_m",
    "x_h1",
    "x_h2",
    "x_h3",
    "x_z",
    "clip",  # bound of abs(x0); infinity: no limit
    "ratio",  # 0, or the quantile of dynamic thresholding, which `clip` then bounds
    "s_0",  # learned variance: log2 of the noise's scale where v = 0
    "s_v",  # ... and what v adds to it
    "k_x",  # inpainting: scale of the known sample
    "k_z",  # ... and of its noise
    "step",  # the row's number in its own table: the noise counter's step
    "advance",  # 1, or 0 at the identity row
)

T, C_IN, X0_X, X0_M, X_X, X_X0, X_M, X_H1, X_H2, X_H3, X_Z, CLIP, *_ = range(len(COLUMNS))
RATIO, S_0, S_V, K_X, K_Z, STEP, ADVANCE = range(CLIP + 1, len(COLUMNS))
