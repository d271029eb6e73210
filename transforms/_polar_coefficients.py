"""Published coefficients of Newton-Schulz steps: polynomials a s + b s^3 + c s^5 that bring singular values to one."""

Triple = tuple[float, float, float]
"""The coefficients (a, b, c) of a step."""

_JORDAN: Triple = (3.4445, -4.7750, 2.0315)
_DION: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_CANS: tuple[Triple, ...] = (
    (8.47032880384807, -25.10807470666187, 18.62927559911801),
    (4.1828341832939415, -3.108701109889242, 0.5806066813500493),
    (3.9618572789616002, -2.9540637463593775, 0.5629761179538961),
    (3.2865862170279674, -2.464720134531287, 0.5073576938614553),
    (2.2737499944340436, -1.644660367908073, 0.4161909274978865),
    (1.8887161973518374, -1.2651572253386165, 0.3765189255574979),
    (1.8750008859819023, -1.250000984536658, 0.37500009855508587),
)
_CLASSICAL: Triple = (15 / 8, -10 / 8, 3 / 8)

COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # The largest slope at zero for which singular values end in about [0.7, 1.2] (Jordan et al.).
    "keller_jordan": (_JORDAN,),
    # Tuned step by step, from a steep slope to a flat one (Ahn et al., "Dion", 2025; also in optax).
    "dion": _DION,
    # Each step the best for the interval that the one before leaves, from [1e-3, 1] on; all but the last divided
    # by 1.01, so that rounding leaves no value outside (Amsel et al., "The Polar Express", 2025, Algorithm 1).
    "polar_express": (
        *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS),
        _CLASSICAL,
    ),
    # The same without a margin for rounding: on [1e-3, 1], then on what the step before leaves, the best polynomial,
    # by Remez' algorithm (Grishina et al., "CANS", 2025; the first five are, to four digits, those in use).
    "cans": (*_CANS, _CLASSICAL),
    # Dion's without the first step, whose work the preconditioner does (Boissin et al., "Turbo-Muon", 2025).
    "aol": _DION[1:],
    # Newton and Schulz' own: converges to exactly one, from a slope of 1.5.
    "cubic": ((1.5, -0.5, 0.0),),
    # Converges to exactly one, from a slope of 1.875 (Higham, "Functions of Matrices", 2008, section 8.3).
    "classical": (_CLASSICAL,),
}
"""Named coefficients (a, b, c), one triple a step; the last one is repeated."""

STEPS, PRECONDITIONING = {"aol": 4}, {"aol": "aol"}
"""Of names that have others than five steps and the Frobenius norm."""
