"""Serving the page of a model, here or as a Space."""

import html

from ddpm_pipe.demo.config import DemoConfig
from ddpm_pipe.demo.draw import Model

try:
    import gradio as gr

    from ddpm_pipe.demo.page import CSS, Page
except ImportError as error:
    raise ValueError("The page needs gradio; install it with pip install 'ddpm_pipe[demo]'.") from error

FONT = (gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "sans-serif")
"""A font that Gradio brings along, in weights that have Latin letters."""


def demo(config: DemoConfig) -> None:
    """Load a model and serve its page until the process is interrupted.

    Raises:
        ValueError: for a model that is not valid, or where gradio is not installed.
        OSError: where a repository does not exist or may not be read, or the port is taken.
    """
    serve(Page(Model.load(config)).blocks(), config)


def serve_space(config: DemoConfig) -> None:
    """Serve the page of a model as a Space; where the model does not load, the page says why."""
    try:
        blocks = Page(Model.load(config)).blocks()
    except (ValueError, OSError) as error:
        blocks = failure(config, " ".join(str(error).split()))
    serve(blocks, config)


def serve(blocks: gr.Blocks, config: DemoConfig) -> None:
    """Serve a page that asks no other machine for anything, until the process is interrupted."""
    blocks.launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open,
        share=False,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        theme=gr.themes.Default(
            primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=("ui-monospace", "monospace")
        ),
        css=CSS,
    )


def failure(config: DemoConfig, reason: str) -> gr.Blocks:
    """Return the page of a model that does not load."""
    with gr.Blocks(title=config.model, analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>{html.escape(config.model)}</h1><p>This model does not load: {html.escape(reason)}</p>")
    return blocks
