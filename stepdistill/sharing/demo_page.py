"""A local page that draws from several pipelines side by side, and takes blind votes between two of them.

It is served on the loopback interface alone, and its pages load nothing from elsewhere.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError
from stepdistill.sharing.drawers import Drawer, Drawing
from stepdistill.sharing.votes import (
    Choice,
    Side,
    Tally,
    Vote,
    append_vote,
    blind_pair,
    now,
    read_votes,
    tally,
)

if TYPE_CHECKING:
    from PIL.Image import Image

HOST = "127.0.0.1"
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)
"""What a page may load: nothing from elsewhere."""
STYLE = """
.gradio-container {max-width: 1180px !important}
@media (max-width: 500px) {.drawn {flex: 0 0 calc(50% - 8px) !important; min-width: 0 !important}}
:focus-visible {outline: 3px solid #c2410c !important; outline-offset: 2px}
"""
SEEDS = 2**31


@dataclass(frozen=True)
class Pair:
    """Two pictures that wait for a vote.

    Attributes:
        prompt, seed: of both.
        left, right: whose they are.
        shown: when they were ready, in seconds of ``time.monotonic``.
    """

    prompt: str
    seed: int
    left: Side
    right: Side
    shown: float


class Demo:
    """What the page does.

    Args:
        drawers: the pipelines; at least one.
        votes: file of JSON lines to which votes are added.
        chooser: of pairs, sides and seeds; None is one that nobody can foresee.

    Raises:
        UserError: two pipelines have one name, or the file holds something else.
    """

    def __init__(self, drawers: Sequence[Drawer], votes: Path, chooser: random.Random | None = None) -> None:
        self.drawers = {drawer.name: drawer for drawer in drawers}
        if len(self.drawers) < len(drawers):
            raise UserError("two of the pipelines have one name: rename a folder")
        self._file, self._chooser = votes, chooser or random.SystemRandom()
        read_votes(votes)

    def side_by_side(self, prompt: str, seed: int, steps: Sequence[int]) -> list[Drawing]:
        """A picture of every pipeline, in order, of one prompt and seed, each in so many steps."""
        chosen = zip(self.drawers.values(), steps, strict=True)
        return [drawer.draw(prompt, seed, count) for drawer, count in chosen]

    def new_pair(self, prompt: str, steps: Sequence[int]) -> tuple[Drawing, Drawing, Pair]:
        """Pictures of two pipelines, shuffled, of one prompt and a new seed."""
        counts = dict(zip(self.drawers, steps, strict=True))
        left, right = blind_pair(list(self.drawers), self._chooser)
        seed = self._chooser.randrange(SEEDS)
        first, second = (self.drawers[name].draw(prompt, seed, counts[name]) for name in (left, right))
        sides = [
            Side(name, each.steps, round(each.seconds, 4)) for name, each in ((left, first), (right, second))
        ]
        return first, second, Pair(prompt, seed, sides[0], sides[1], time.monotonic())

    def vote(self, pair: Pair, choice: Choice) -> Vote:
        """Keeps a vote for a pair."""
        seconds = round(time.monotonic() - pair.shown, 1)
        given = Vote(pair.prompt, pair.seed, pair.left, pair.right, choice, seconds, now())
        append_vote(self._file, given)
        return given

    def counts(self) -> list[Tally]:
        """All votes of the file between these pipelines."""
        return tally(read_votes(self._file), list(self.drawers))


def enlarged(image: Image) -> Image:
    """A picture whose longer side has at least 256 pixels: a smaller one is repeated pixel by pixel."""
    factor = -(-256 // max(image.size))
    return image if factor == 1 else image.resize((image.width * factor, image.height * factor), 0)


def caption(name: str, drawing: Drawing) -> str:
    """One line under a picture."""
    return f"**{name}**: {_steps(drawing.steps)}, {drawing.seconds:.2f} s"


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def verdict(vote: Vote) -> str:
    """One line that says whose pictures they were."""
    sides = {"A": vote.left, "B": vote.right}
    whose = ", ".join(
        f"{letter} was **{side.name}** ({_steps(side.steps)}, {side.seconds:.2f} s)"
        for letter, side in sides.items()
    )
    return f"{whose}. Your vote: {vote.winner or 'no difference'}."


def standing(counts: Sequence[Tally]) -> str:
    """What votes add up to, a Markdown list."""
    rows = []
    for each in counts:
        low, high = each.interval
        pair = f"- **{each.first}** against **{each.second}**"
        if each.share is None:
            rows.append(f"{pair}: " + (f"{each.same} for no difference" if each.same else "no votes yet"))
        else:
            rows.append(
                f"{pair}: {each.first_better} to {each.second_better}, and {each.same} for no difference; {each.first} "
                f"wins {each.share:.0%} [{low:.0%}, {high:.0%}]"
            )
    return "\n".join([*rows, "", "In brackets: the 95 % interval of that share."])


def build(demo: Demo, prompt: str) -> Any:
    """The Gradio page.

    Args:
        demo: what it does.
        prompt: that it opens with.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    drawers = list(demo.drawers.values())
    with gr.Blocks(analytics_enabled=False, title="stepdistill demo", delete_cache=(3600, 3600)) as page:
        gr.Markdown("# Students and teacher, side by side")
        text = gr.Textbox(prompt, label="Prompt", lines=1, max_lines=1, autofocus=True)
        with gr.Row():
            counts = [_steps_control(gr, drawer) for drawer in drawers]
        with gr.Tab("Side by side"):
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEEDS)
            draw = gr.Button("Draw", variant="primary")
            outputs: list[Any] = []
            with gr.Row():
                for drawer in drawers:
                    with gr.Column(min_width=140, elem_classes="drawn"):
                        outputs += [
                            _picture(gr, f"drawn by {drawer.name}"),
                            gr.Markdown(f"**{drawer.name}**"),
                        ]

            def draw_all(prompt: str, seed: int, *steps: int) -> list[Any]:
                drawn = _told(gr, lambda: demo.side_by_side(prompt, int(seed), [int(n) for n in steps]))
                return [
                    part
                    for name, each in zip(demo.drawers, drawn, strict=True)
                    for part in (enlarged(each.image), caption(name, each))
                ]

            for event in (draw.click, text.submit):
                event(draw_all, [text, seed, *counts], outputs, concurrency_id="draw")
        if len(drawers) > 1:
            with gr.Tab("Blind vote"):
                _votes(gr, demo, text, counts)
    page.queue(default_concurrency_limit=1)  # a pipeline draws one picture at a time
    return page


def _votes(gr: Any, demo: Demo, text: Any, counts: list[Any]) -> None:
    """The tab of blind votes."""
    waiting = gr.State(None)
    gr.Markdown(
        "Two of the pipelines draw the prompt with a new seed. Their names are shown after your vote."
    )
    new = gr.Button("Draw a pair", variant="primary")
    with gr.Row():
        pictures = [_picture(gr, f"picture {letter}", letter) for letter in "AB"]
    with gr.Row():
        buttons = {
            "left": gr.Button("A is better"),
            "same": gr.Button("No difference"),
            "right": gr.Button("B is better"),
        }
    said = gr.Markdown("")
    results = gr.Markdown(standing(demo.counts()))

    def draw_pair(prompt: str, *steps: int) -> list[Any]:
        first, second, pair = _told(gr, lambda: demo.new_pair(prompt, [int(n) for n in steps]))
        return [
            enlarged(first.image),
            enlarged(second.image),
            pair,
            "Which is better?",
            standing(demo.counts()),
        ]

    new.click(draw_pair, [text, *counts], [*pictures, waiting, said, results], concurrency_id="draw")

    def voted(choice: Choice, pair: Pair | None) -> list[Any]:
        if pair is None:
            return [None, "Draw a pair first.", standing(demo.counts())]
        return [None, verdict(demo.vote(pair, choice)), standing(demo.counts())]

    for choice, button in buttons.items():
        button.click(lambda pair, choice=choice: voted(choice, pair), [waiting], [waiting, said, results])


def _picture(gr: Any, alt: str, label: str | None = None) -> Any:
    return gr.Image(
        type="pil", format="png", interactive=False, buttons=[], alt_text=alt, label=label,
        show_label=label is not None, elem_classes="picture", min_width=140,
    )  # fmt: skip


def _steps_control(gr: Any, drawer: Drawer) -> Any:
    """A slider where the counts are all from one to another, else a choice among them."""
    label, counts = f"Steps of {drawer.name}", drawer.step_counts
    if len(counts) > 2 and counts == tuple(range(counts[0], counts[-1] + 1)):
        return gr.Slider(counts[0], counts[-1], drawer.steps, step=1, label=label)
    return gr.Radio([(str(n), n) for n in counts], value=drawer.steps, label=label)


def _told(gr: Any, work: Any) -> Any:
    """What ``work`` returns; a user's mistake is a message on the page."""
    try:
        return work()
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def application(page: Any) -> Any:
    """The page as a web application, which answers the loopback interface alone and lets a page load only its own."""
    import gradio as gr
    from fastapi import FastAPI, Request, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI()

    async def within(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    app.middleware("http")(within)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(
        app, page, "/", server_name=HOST, theme=theme, css=STYLE, footer_links=[], ssr_mode=False
    )
    return app


def check_port(port: int) -> None:
    """The page can be served on this port.

    Raises:
        UserError: another program has it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} cannot be served ({error.strerror}): give another --port") from None


def serve(page: Any, port: int) -> None:
    """Serves the page until it is interrupted."""
    import uvicorn

    uvicorn.run(application(page), host=HOST, port=port, log_level="warning")
