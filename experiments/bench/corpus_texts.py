"""The text of the main part of HTML pages as JSON lines of `key` and `text`.

python experiments/bench/corpus_texts.py texts.jsonl FOLDER...  # keys are paths behind `html/`
"""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

SKIPPED = {"script", "style", "nav", "noscript", "svg", "head", "template"}
ENDS_A_LINE = {"p", "div", "li", "h1", "h2", "h3", "h4", "pre", "tr", "section", "br", "dt", "dd"}


class Text(HTMLParser):
    """Collects the text within <main> and outside of SKIPPED."""

    def __init__(self):
        super().__init__()
        self.pieces, self.depth, self.is_main = [], 0, False

    def handle_starttag(self, tag, attrs):
        """Also ends a line."""
        self.is_main |= tag == "main"
        self.depth += tag in SKIPPED
        self.pieces += "\n" * (tag in ENDS_A_LINE)

    def handle_endtag(self, tag):
        """Also ends a line."""
        self.is_main &= tag != "main"
        self.depth -= tag in SKIPPED
        self.pieces += "\n" * (tag in ENDS_A_LINE)

    def handle_data(self, data):
        """Text between tags."""
        if self.is_main and self.depth <= 0:
            self.pieces.append(data)

    def lines(self):
        """The lines that hold something."""
        stripped = (line.strip() for line in "".join(self.pieces).split("\n"))
        return "\n".join(line for line in stripped if line)


def main(output, *folders):
    """Writes one line a page that has text."""
    with Path(output).open("w") as file:
        for number, folder in enumerate(folders):
            for path in sorted(Path(folder).rglob("*.html")):
                parser = Text()
                parser.feed(path.read_text(errors="replace"))
                text = parser.lines()
                key = f"{number}/{str(path).split('/html/')[-1]}"
                if text:
                    file.write(json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
