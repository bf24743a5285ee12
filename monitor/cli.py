"""The command line: `phasewatch demo` and `phasewatch circuit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """See the insides of a transformer change while it trains, and how sure that is."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1_600,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the data and the probes.")] = 0,
    root: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("runs"),
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Where to serve metrics (0: any free port).")
    ] = 9464,
) -> None:
    """Train a small transformer on real text and watch induction heads form: about a minute."""
    # Here, so that `--help` need not wait for torch.
    from monitor.demo.training import run

    try:
        run(steps=steps, seed=seed, root=root, port=port)
    except (ValueError, OSError, RuntimeError) as error:
        typer.secho(f"phasewatch demo: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("Stopped before training began.", err=True)
        raise typer.Exit(130) from None


@app.command()
def circuit(
    root: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("runs"),
    run: Annotated[str | None, typer.Option(help="By default the last measured.")] = None,
    step: Annotated[int | None, typer.Option(help="By default the last with edges.")] = None,
    output: Annotated[Path, typer.Option(help="An SVG, PNG or PDF.")] = Path("circuit.svg"),
) -> None:
    """Draw the heads of the induction circuit at a step, and say how much of it is shown."""
    from monitor import picture

    try:
        edges = picture.circuit_at(root, run=run, step=step)
        path = picture.save(edges, output)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        typer.secho(f"phasewatch circuit: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{path}: {picture.title(edges)}.\n{picture.caption(edges)}")
