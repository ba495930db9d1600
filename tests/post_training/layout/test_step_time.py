from itertools import product

from post_training.layout.step_time import COMPUTE_EFFICIENCY, LINK_EFFICIENCY
from tests.helpers.public_points import points, time_error

# The largest tensor parallel size, a pipeline and both kinds of devices.
FITTED = (4, 15, 16)
OTHERS = (1, 2, 3)


def test_efficiencies_are_fitted_on_three_points_and_hold_on_others():
    timed = {p["point"]: (p, args) for p, args in points() if "step_s" in p}

    def worst(names, compute, link):
        return max(abs(time_error(*timed[name], compute=compute, link=link)) for name in names)

    steps = product(range(38, 56), range(15, 60, 3))
    fit = min(((c / 100, li / 100) for c, li in steps), key=lambda pair: worst(FITTED, *pair))
    assert fit == (COMPUTE_EFFICIENCY, LINK_EFFICIENCY)
    assert worst(OTHERS, *fit) <= 0.15
    # Another model, of which nothing was fitted.
    assert worst((5, 6, 7, 8), *fit) <= 0.15
    print({name: f"{time_error(*pair):+.1%}" for name, pair in timed.items()})
