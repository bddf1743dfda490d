"""The columns of a step table: names and order, once, for the solvers, the reference and the kernels.

A row drives one model evaluation ``m = model(c_in * x, t)`` and one update of the state:

    x0  = limit(x0_x * x + x0_m * m)                     # predicted clean sample; limit: to [-clip, clip]
    x'  = x_x * x + x_x0 * x0 + x_m * m + x_h1 * h1 + x_h2 * h2 + x_z * z
    h2' = h1;  h1' = x0                                  # history, only where a solver asks for it

and then the sample's cursor moves on by ``advance`` rows. Tables of several solvers can stand behind one another in one
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
    "x_z",
    "clip",  # bound of |x0|; infinity: no limit
    "step",  # the row's number in its own table: the noise counter's step
    "advance",  # 1, or 0 at the identity row
)

T, C_IN, X0_X, X0_M, X_X, X_X0, X_M, X_H1, X_H2, X_Z, CLIP, STEP, ADVANCE = range(len(COLUMNS))
