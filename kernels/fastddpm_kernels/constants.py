"""Numbers that the Triton kernels and their torch twins share, so that both compute the same noise.

The polynomials are minimax fits in float64, rounded to float32, of the least degree that keeps the normal within 4e-6
of float64 from the same words; `tests/test_noise.py` has the figure.
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

# The radius is that of a float32 in (0, 1]: u = word * 2^-32 + 2^-33. Its least value, 2^-33, bounds a normal by
# sqrt(66 ln 2) = 6.764.
U_SCALE = 2.0**-32
U_OFFSET = 2.0**-33

# u = 2^e (1 + f) with 1 + f in [0.612, 1.224), and -2 ln(1 + f) = f * Q(f). Q is the best for the normal, not for the
# logarithm: the error of r = sqrt(-2 ln u) is that of its square over 2 r, and r is at least 0.9 unless u is in
# [0.612, 1). Six terms move a normal by 1.6e-6 at most; with five it would be 1.1e-5, with seven 2.6e-7.
LOG_SPLIT = 0x3F1CAC08  # the bits of 0.612
LOG_EXPONENT = -1.3862943611198906 * 2.0**-23  # -2 ln 2, for an exponent that still stands in its place
LOG = (
    -1.99996018409729,
    1.0004125833511353,
    -0.6695992946624756,
    0.4755586087703705,
    -0.36885419487953186,
    0.6796321868896484,
)

# sin(2 pi a) = a * S(a^2) for |a| <= 1/4; absolute error 3.3e-9. With four terms 5.9e-7, and 4e-6 in a normal of 6.76.
SIN = (6.283185005187988, -41.34165573120117, 81.60100555419922, -76.5497817993164, 39.536705017089844)


def chunk(n: int) -> int:
    """Lanes a sample of n elements has: q of the noise contract."""
    quarter = -(-n // 4)
    return -(-quarter // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
