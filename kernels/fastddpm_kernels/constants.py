"""Numbers that the Triton kernels and their torch twins share, so that both compute the same noise.

The polynomials are minimax fits in float64, rounded to float32. The normal's accuracy with them (in float32, against
float64 from the same words) is 2e-6 absolute; `tests/test_noise.py` holds it under 4e-6.
"""

# Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): multipliers and key increments.
PHILOX_M0 = 0xD2511F53
PHILOX_M1 = 0xCD9E8D57
PHILOX_W0 = 0x9E3779B9
PHILOX_W1 = 0xBB67AE85
PHILOX_ROUNDS = 10

# The four streams of a seed. A change of anything here, or of the counter's layout, is a new stream version.
STREAM_VERSION = 1
STREAM_INITIAL, STREAM_STEP, STREAM_TRAINING, STREAM_INPAINTING = range(4)

# One Philox block makes four normals: element e of n takes normal e // q of lane e % q, where q = ceil(n/4) is rounded
# up to this. It keeps the four chunks of a sample 16-byte aligned.
CHUNK_MULTIPLE = 16

# A float32 in (0, 1]: u = word * 2^-32 + 2^-33. Its least value, 2^-33, bounds a normal by sqrt(66 ln 2) = 6.764.
U_SCALE = 2.0**-32
U_OFFSET = 2.0**-33

# -2 ln(1 + f) = f * Q(f) for f in [-1/3, 1/3]; relative error 2.3e-6, which moves a normal by 5e-7 at most, since the
# error of r = sqrt(-2 ln u) is that of its square over 2 r. Seven terms; with six it would be 3e-6.
LOG = (
    -1.9999992847442627,
    1.000044822692871,
    -0.666815459728241,
    0.49683231115341187,
    -0.3945644199848175,
    0.3881598711013794,
    -0.3502419590950012,
)
MINUS_TWO_LN2 = -1.3862943611198906

# sin(2 pi a) = a * S(a^2) for |a| <= 1/4; absolute error 3.3e-9. With four terms 5.9e-7, and 4e-6 in a normal of 6.76.
SIN = (6.283185005187988, -41.34165573120117, 81.60100555419922, -76.5497817993164, 39.536705017089844)


def chunk(n: int) -> int:
    """Lanes a sample of n elements has: q of the noise contract."""
    quarter = -(-n // 4)
    return -(-quarter // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
