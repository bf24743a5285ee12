"""The command line: `phasewatch demo`, `watch`, `serve`, `report` and others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
    runs: Annotated[
        int, typer.Option(min=1, help="One after the other, with the seeds from --seed on.")
    ] = 1,
) -> None:
    """Train a small transformer on real text and watch induction heads form: about a minute."""
    # Here, so that `--help` need not wait for torch.
    from monitor.demo.training import run

    try:
        run(steps=steps, seed=seed, root=root, port=port, runs=runs)
    except (ValueError, OSError, RuntimeError) as error:
        typer.secho(f"phasewatch demo: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("Stopped before training began.", err=True)
        raise typer.Exit(130) from None


@app.command()
def watch(
    *,
    root: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("runs"),
    run: Annotated[
        str | None, typer.Option(help="By default the newest that is running, else the last one.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print what there is, and end.")] = False,
    axis: Annotated[
        Literal["step", "tokens", "time"], typer.Option(help="Along what curves are drawn.")
    ] = "step",
) -> None:
    """Watch a run in the terminal, while other processes write it or afterwards."""
    from monitor.across.printed import console
    from monitor.terminal.watching import watch as follow

    try:
        follow(root, run=run, once=once, axis=axis, console=console())
    except (LookupError, OSError) as error:
        typer.secho(f"phasewatch watch: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command()
def transitions(
    *,
    root: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("runs"),
    run: Annotated[list[str] | None, typer.Option(help="Again for more; by default all.")] = None,
    align: Annotated[bool, typer.Option("--align", help="Put the runs on one axis.")] = False,
    axis: Annotated[
        Literal["step", "tokens", "log_step"], typer.Option(help="Which axis (log_step: of fits).")
    ] = "step",
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit every series: onset, width, intervals, leads.")
    ] = False,
    csv: Annotated[bool, typer.Option("--csv", help="The table as CSV, whole.")] = False,
) -> None:
    """Say what formed in which run, and when; with --align, in how many runs and how far apart;
    with --fit, how each series went from one level to another.
    """
    from monitor.across import fitted, formations, universality
    from monitor.across.printed import console, print_fits, print_formations, print_universality

    to = console()
    try:
        if axis == "log_step" and not fit:
            raise ValueError("log_step is an axis of fits: pass --fit, or another --axis")
        formed = formations(root, run)
        if formed.empty:
            raise ValueError(f"no runs in {root}: expected the root= of a run")
        if fit:
            with to.status("fitting …"):
                fits = fitted(root, run, axis=axis)
    except (ValueError, OSError) as error:
        typer.secho(f"phasewatch transitions: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    if fit and not csv:
        print_fits(to, fits, axis)
        return
    common: Literal["step", "tokens"] = "tokens" if axis == "tokens" else "step"
    if csv:
        table = fits if fit else universality(formed, common) if align else formed
        typer.echo(table.to_csv(index=False), nl=False)
        return
    print_formations(to, formed)
    if align:
        to.print()
        print_universality(to, formed, common)


@app.command()
def serve(
    root: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free one.")] = 8787,
) -> None:
    """Serve every run under a folder, also while it is written: JSON, CSV, events and metrics."""
    from monitor.service import Service

    try:
        service = Service(root, host=host, port=port)
    except OSError as error:
        typer.secho(f"phasewatch serve: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    empty = "" if root.is_dir() and any(root.iterdir()) else " (no runs yet)"
    typer.echo(f"{root}{empty}: {service.url}")
    try:
        service.wait()
    except KeyboardInterrupt:
        service.close()


@app.command()
def report(
    run: Annotated[
        list[str] | None, typer.Argument(help="By default the last measured; several for more.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("runs"),
    output: Annotated[Path, typer.Option("--output", "-o", help="An HTML file.")] = Path(
        "report.html"
    ),
) -> None:
    """Write the live page of a run as one file, which needs no service and no internet."""
    from monitor.across.printed import console
    from monitor.service.reporting import write

    try:
        with console().status("fitting transitions, gathering tables …"):
            path = write(root, output, run)
    except (ValueError, OSError) as error:
        typer.secho(f"phasewatch report: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


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
