"""The command line: `kymo VERB`. A verb reads a YAML, calls one function and shows what came out.

Exit codes: 0 complete, 1 a bug, 2 wrong configuration or input, 3 complete with quarantine within the budget,
4 quarantine over the budget, 5 an artefact that breaks its contract, 130 interrupted. With `--exit-code`, `kymo diff`
ends with 1 when the snapshots differ, as git does.
"""

import sys

import typer
from rich.markup import escape

from jobs import (
    adapter_verbs,
    bundle_verbs,
    corpus_verbs,
    data_verbs,
    evaluate_verbs,
    export_verbs,
    loader_verbs,
    machine_verbs,
    predict_verbs,
    snapshot_verbs,
    trainer_verbs,
)
from jobs.console import console, set_up_logging
from manifests.errors import ConfigError, ContractError, RecordingError

app = typer.Typer(
    name="kymo",
    help="EEG, ECG and sleep recordings → UCS-tagged shards → pretraining → LoRA adapters → bundles.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(verbose: bool = typer.Option(False, "--verbose", "-v", help="Log every step.")) -> None:
    """EEG, ECG and sleep recordings → UCS-tagged shards → pretraining → LoRA adapters → bundles."""
    set_up_logging(verbose=verbose)


# Packages whose errors tell of an object store and not of a fault of ours.
STORE_CLIENTS = frozenset({"aiobotocore", "aiohttp", "botocore", "gcsfs", "google"})
INTERRUPTED = 130  # what typer makes of Ctrl-C
DATA, TRAINING, ADAPTERS, MACHINE = "Data", "Pretraining", "Adapters", "Machine"
for panel, verb in (
    (DATA, corpus_verbs.corpora),
    (DATA, corpus_verbs.fetch),
    (DATA, data_verbs.scan),
    (DATA, data_verbs.plan),
    (DATA, data_verbs.convert),
    (DATA, data_verbs.status),
    (DATA, data_verbs.verify),
    (DATA, data_verbs.report),
    (DATA, data_verbs.preview),
    (DATA, snapshot_verbs.diff),
    (DATA, snapshot_verbs.repack),
    (TRAINING, loader_verbs.mix),
    (TRAINING, loader_verbs.simulate),
    (TRAINING, trainer_verbs.pretrain),
    (TRAINING, evaluate_verbs.evaluate),
    (TRAINING, export_verbs.export),
    (ADAPTERS, adapter_verbs.adapt),
    (ADAPTERS, adapter_verbs.finetune),
    (ADAPTERS, adapter_verbs.ablate),
    (ADAPTERS, predict_verbs.predict),
    (ADAPTERS, bundle_verbs.publish),
    (MACHINE, machine_verbs.demo),
    (MACHINE, machine_verbs.doctor),
    (MACHINE, machine_verbs.submit),
):
    app.command(rich_help_panel=panel)(verb)
app.add_typer(snapshot_verbs.quarantine, name="quarantine", rich_help_panel=DATA)
app.add_typer(bundle_verbs.bundles, name="bundle", rich_help_panel=ADAPTERS)


def main() -> None:
    """Run a verb; an error that the operator must act on is one message, not a traceback."""
    try:
        app()
    except ConfigError as error:
        console.print(f"[bold red]wrong input:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except RecordingError as error:
        console.print(f"[bold red]recording refused ({error.reason}):[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except ContractError as error:
        console.print(f"[bold red]broken artefact:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(5)
    except OSError as error:
        if error.filename is None:
            raise
        where = f"{error.filename} → {error.filename2}" if error.filename2 else error.filename
        console.print(
            f"[bold red]wrong input:[/] {escape(str(where))}: {error.strerror}; give another path", soft_wrap=True
        )
        sys.exit(2)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in STORE_CLIENTS:
            raise
        console.print(
            f"[bold red]wrong input:[/] the object store does not answer ({type(error).__name__}: "
            f"{escape(str(error))}); check the URL, the network, AWS_ENDPOINT_URL and the credentials",
            soft_wrap=True,
        )
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            console.print("interrupted; run the same command again to go on")
        raise


if __name__ == "__main__":
    main()
