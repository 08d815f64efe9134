"""What every page of Lumina shares: its skeleton and style, and tokens as text that is safe in it.

T positions.
"""

from collections.abc import Iterable
from html import escape

import numpy as np

from lumina.tokenizer import StreamDecoder, Tokenizer

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def whole(title: str, body: str, style: str = "") -> str:
    """A self-contained page: `body` and `style`, in which all that is not the project's own has been escaped."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


class Shown:
    """Tokens as text that is safe in a page: nothing in them is markup, and nothing is invisible."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def token(self, token: int) -> str:
        """One token; bytes that are no text by themselves are spelled out."""
        piece = self.tokenizer.decode_bytes([token])
        if not piece:
            return escape(visible(self.tokenizer.decode([token])))
        try:
            return escape(visible(piece.decode("utf-8")))
        except UnicodeDecodeError:
            return escape("".join(f"\\x{byte:02x}" for byte in piece))

    def text(self, tokens_T: np.ndarray) -> Iterable[tuple[str, int]]:
        """(text, place of the token that completes it): a character of several tokens appears with the last one."""
        decoder = StreamDecoder(self.tokenizer)
        for t, token in enumerate(tokens_T):
            if text := decoder.feed(int(token)):
                yield escape(_spelled(text)).replace("\n", "<span class=faint>↵</span>\n"), t


def visible(text: str) -> str:
    """`text` with a sign for each space, tab and line end, and characters that no one sees spelled out."""
    return _spelled(text.replace(" ", "␣")).replace("\n", "↵").replace("\t", "⇥")


def _spelled(text: str) -> str:
    """Control and formatting characters as escapes, such as those that turn the direction of writing."""
    return "".join(c if c.isprintable() or c in " \n\t" else c.encode("unicode_escape").decode() for c in text)


STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2330;--faint:#667085;--line:#e1e5ec;--chip:#f1f4f9;--shade:31 119 180}
@media(prefers-color-scheme:dark){:root{--paper:#171b24;--ink:#e3e7ef;--faint:#98a2b3;--line:#2b3241;--chip:#232a38;
--shade:64 150 214}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:52rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .25rem}
.faint{color:var(--faint);font-size:.875rem}
.advice li{margin:.5rem 0}
figure{margin:1rem 0}img{width:100%;height:auto;display:block}figcaption{color:var(--faint);font-size:.875rem}
summary{cursor:pointer;padding:.25rem 0;font-weight:600}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:.3rem .5rem;border-top:1px solid var(--line);text-align:left;vertical-align:top}
th{white-space:nowrap}.share{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.chip{display:inline-block;background:var(--chip);border-radius:.35rem;padding:0 .4rem;margin:.1rem 0;font-size:.75rem;
color:var(--faint)}
.chip code{color:var(--ink);font-size:.875rem;margin-right:.4rem}
.sample{white-space:pre-wrap;font:.875rem/1.7 ui-monospace,monospace;border:1px solid var(--line);border-radius:.35rem;
padding:.75rem}
"""
