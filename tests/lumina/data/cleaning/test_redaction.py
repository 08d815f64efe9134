"""What is redacted, what is not, and in how many looks."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.cleaning.redaction import Redact
from lumina.data.recipe import Recipe
from lumina.data.records import Document
from lumina.errors import UsageError
from tests.waiting import GIVES_UP

ALL = Redact(Recipe(redact="url,email,phone,key,code"))
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PRIVATE = (
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,AB\n\nMIIEow\n-----END RSA PRIVATE KEY-----"
)


def redacted(value, step=ALL):
    return step(Document("x", value)).text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("see https://example.com/a_(b)?q=1#x, or", "see [URL], or"),
        ("(www.example.com).", "([URL])."),
        ("ftp://host/file <http://a.b/c>", "[URL] <[URL]>"),
        ("mail jane.doe+x@mail.example.co.uk.", "mail [EMAIL]."),
        ("call +49 89 1234567 now", "call [PHONE] now"),
        ("call +49 (0) 89-1234567, now", "call [PHONE], now"),
        ("call +14155552671", "call [PHONE]"),
        ("(212) 555-1234 or 212-555-1234 or 212.555.1234", "[PHONE] or [PHONE] or [PHONE]"),
        ("1-800-555-1234", "[PHONE]"),
        ("1 (800) 555-1234", "[PHONE]"),
        ("Tel.: 089 / 12345-67", "Tel.: [PHONE]"),
        ("Fax 030 1234567", "Fax [PHONE]"),
        (f"key:\n{PRIVATE}\nend", "key:\n[KEY]\nend"),
        ("id AKIAIOSFODNN7EXAMPLE;", "id [KEY];"),
        ('AWS_SECRET_ACCESS_KEY="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"', '[KEY]"'),
        ("ghp_" + "a1B2" * 9, "[KEY]"),
        ("sk-proj-" + "abcd1234" * 4, "[KEY]"),
        (f"Bearer {JWT}.", "Bearer [KEY]."),
        ("postgres://user:hunter2@db/x", "postgres://[KEY]@db/x"),
        ("a\n```python\nx = 1\n```\nb", "a\n[CODE]\nb"),
        ("~~~~\n```\nx\n~~~~\nb", "[CODE]\nb"),
        ("````\n```\nx\n```\n````", "[CODE]"),
    ],
)
def test_what_is_named_is_replaced(value, expected):
    assert redacted(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "on 2024-01-15 at 10:00:00 +0100, 15.01.2024 and 01/15/2024",
        "versions 1.2.3, 212.555.12, 3.11.7-2024 and 1.234.567.8901",
        "ISBN 978-3-16-148410-0 and 0-306-40615-2",
        "host 192.168.100.200 and 2001:db8::1",
        "1,234,567.89 +35236450.64 -1234567890 1e+1234567890 a+12345678901",
        "222-333-44445 and 1222-333-4444 and 2024-222-333-4444",
        "id 123e4567-e89b-12d3-a456-426614174000",
        "sha 2fd4e1c67a2d28fced849ee1bb76e7391b93eb12",
        "telling 1234567 telephones",
        "@property def f(x): return x @ y",
        "sk-learn, risk-free, sk-12, task-management-and-planning-tool",
        "-----BEGIN PRIVATE KEY----- is how a key begins",
        "a `b` ``` c ``` d",
        "```\nnever closed",
        "std::vector http:// www. x",
    ],
)
def test_ordinary_text_is_left_alone(value):
    assert redacted(value) == value


def test_only_what_is_named_is_replaced():
    value = "a@example.com http://example.com"
    assert redacted(value, Redact(Recipe(redact="email"))) == "[EMAIL] http://example.com"
    assert redacted(value, Redact(Recipe(redact=""))) == value
    assert Redact(Recipe())(Document("x", "x" * 99)).text == "x" * 99


def test_an_unknown_redaction_is_refused():
    with pytest.raises(UsageError, match="'emails' is not known; there are code, key"):
        Redact(Recipe(redact="url,emails"))


PIECES = ["https://", "www.", "a", "1", "2", "@", ".", "-", "+", "(", ")", " ", "\n", "```", "AKIA", "eyJ", "PRIVATE KEY-----"]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_what_was_redacted_stays_as_it_is(value):
    once = redacted(value)
    assert redacted(once) == once


# Each is what some pattern starts on and then does not end in.
PIECES_OF_NOTHING = [
    *("a", "a.", "a@", "a@a.", "@", "1", "1-", "+1", "+1 ", "(222", "222-", "222-333-", "tel ", "tel 1", "tel 1 ", "é", "..."),
    *("http://", "http://.", "www.", "x:", "://a", "://a:", "-", "-----", "PRIVATE KEY", "-----BEGIN PRIVATE KEY-----"),
    *("eyJ", "eyJaaaaaaaaaa.", "eyJaaaaaaaaaa.eyJ", "ghp_", "ghp_a", "sk-", "sk-a", "sk-ant-", "xoxb-", "AKIA"),
    *("aws_secret_access_key", "aws_secret_access_key = ", "`", "```", "```\n", "~~~a\n", " ", "\n", " \n", "\n ", "Â ", "Ã"),
]
HARD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (300, 300))  # its own seconds, which other processes take nothing of
from lumina.data.cleaning.steps import steps
from lumina.data.recipe import Recipe
from lumina.data.records import Document
redact = Recipe(steps="redact", redact="url,email,phone,key,code")
others = Recipe(steps="repair,control,quality,language,decontaminate")
for recipe, size in (redact, 100_000), (others, 30_000):
    for step in steps(recipe, ["a b c d e f"]):
        for piece in sys.argv[1:]:
            step(Document("x", piece * (size // len(piece)) + " http:// @ tel PRIVATE KEY eyJ ghp_ sk- xox + aws_secret"))
print("done")
"""


def test_no_text_takes_more_than_time_in_proportion_to_its_length():
    """Seconds in all; of a pattern that looks at all of the text from each of its characters, minutes for one of them."""
    command = [sys.executable, "-c", HARD, *PIECES_OF_NOTHING]
    assert subprocess.run(command, capture_output=True, text=True, timeout=GIVES_UP, check=True).stdout == "done\n"
