"""Hooks of mkdocs: pages that are made of the code, and links that leave the pages."""

import html
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from jaxscale import cli, described, run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "experiments/results/"
MEASUREMENTS = "measurements/"
LINK = re.compile(r"\[([^\]]*)\]\(([^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference of fields, and the pages of measured results."""
    files.append(File.generated(config, "fields.md", content=fields_page()))
    for path in sorted((ROOT / RESULTS).iterdir()):
        # The folder's README is for its visitors: the page of results leads to the others here.
        if path.suffix in (".md", ".png") and path.name != "README.md":
            source = File.generated(config, MEASUREMENTS + path.name, abs_src_path=str(path))
            files.append(source)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns a link to a file of the repository that is no page into the name of the file.

    The page of results gets a list of all of them.
    """
    folder = ROOT / "docs"
    if page.file.src_uri == "results.md":
        markdown += measured_pages()
    if page.file.src_uri.startswith(MEASUREMENTS):
        folder = ROOT / RESULTS

    def link(match: re.Match) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        place = (folder / path).resolve().relative_to(ROOT).as_posix()
        in_site = place.replace(RESULTS, MEASUREMENTS).removeprefix("docs/")
        if files.get_file_from_path(in_site):
            up = "../" * page.file.src_uri.count("/")
            return f"[{text}]({up}{in_site}{'#' * bool(anchor)}{anchor})"
        return f"{text} (`{place}`)"

    return LINK.sub(link, markdown)


def measured_pages() -> str:
    """A line for each page of measured results, the newest first, and one for what did not help."""
    lines = ["\n## All pages\n"]
    for path in sorted((ROOT / RESULTS).glob("20*.md"), reverse=True):
        date = path.name[: len("2026-11-29")]
        title = path.read_text().splitlines()[0].removeprefix("# ")
        lines.append(f"- {date}: [{title}](../{RESULTS}{path.name})")
    lines.append(f"- [What was tried and did not help](../{RESULTS}LOG.md)")
    return "\n".join(lines)


def fields_page() -> str:
    """The reference of fields: the verbs, then the parts of a run, as a gin file names them."""
    lines = [
        "# Fields",
        "What a gin file binds, and what `--set` gives on the command line. "
        "A class of `jaxscale.run` is bound as `run.NAME.FIELD`; a field of a run is given as "
        "`--set PART.FIELD=VALUE`, such as `--set train.steps=100`.",
        "## Verbs",
    ]
    for name, verb in cli.VERBS.items():
        lines += _section(f"jaxscale {name}", cli.load(verb.function))
    lines.append("## Parts of a run")
    for name in run.__all__:
        lines += _section(name, getattr(run, name))
    return "\n\n".join(lines)


def _section(title: str, target: object) -> list[str]:
    lines = [f"### {title}", _text(described.summary(target))]
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for field in described.fields(target):
        code = [_code(text) for text in (field.name, field.type, field.default)]
        rows.append(f"| {' | '.join(code)} | {_text(field.meaning)} |")
    if len(rows) > 2:
        lines.append("\n".join(rows))
    return lines


def _code(text: str) -> str:
    """A cell in which | does not end the cell, as it would between backticks."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def _text(text: str) -> str:
    """A docstring's text, in which *, < and | stand for themselves."""
    return re.sub(r"([*<|])", r"\\\1", text)
