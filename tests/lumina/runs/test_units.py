"""Numbers as a person reads them, at the edges where rounding changes the unit."""

import pytest

from lumina.runs.units import decimal_bytes, duration, gib, si


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (7, "7"),
        (12.345, "12.3"),
        (0.5, "0.5"),
        (999.4, "999"),
        (999.6, "1.00 K"),
        (1000, "1.00 K"),
        (9_994, "9.99 K"),
        (9_996, "10.0 K"),
        (21_500, "21.5 K"),
        (99_940, "99.9 K"),
        (99_960, "100 K"),
        (999_400, "999 K"),
        (999_600, "1.00 M"),
        (4_000_000, "4.00 M"),
        (56.5e9, "56.5 B"),
        (1.59e12, "1.59 T"),
        (2.5e15, "2.50 P"),
        (3e18, "3.00 E"),
        (3e21, "3000 E"),
        (-21_500, "-21.5 K"),
    ],
)
def test_si_shows_three_digits_and_the_prefix_of_the_rounded_number(value, shown):
    assert si(value) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 MiB"),
        (2**20, "1 MiB"),
        (1.6 * 2**20, "2 MiB"),
        (1023.4 * 2**20, "1023 MiB"),
        (1023.6 * 2**20, "1.00 GiB"),
        (2**30, "1.00 GiB"),
        (9.994 * 2**30, "9.99 GiB"),
        (9.996 * 2**30, "10.0 GiB"),
        (99.96 * 2**30, "100 GiB"),
        (4000 * 2**30, "4000 GiB"),
    ],
)
def test_gib_shows_bytes_in_powers_of_two(count, shown):
    assert gib(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.0 kB"),
        (12_345, "12.3 kB"),
        (49_999, "50.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (2**20, "1.0 MB"),
        (1_234_500_000, "1,234.5 MB"),
    ],
)
def test_small_files_have_a_size_too(count, shown):
    assert decimal_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (0.6, "0:01"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (125, "2:05"),
        (599, "9:59"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (86_399, "23:59:59"),
        (86_399.6, "1 d 0 h"),
        (3 * 86_400 + 4 * 3600 + 3599, "3 d 4 h"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_duration_carries_what_rounds_up_into_the_next_unit(seconds, shown):
    assert duration(seconds) == shown
