"""A deploy that is really killed, against moto's HTTP server; delete, and deploy again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
from conftest import ROOT
from moto.server import ThreadedMotoServer
from sagemaker_double import REGION, ROLE, archive_file


def test_killed_in_the_middle_of_the_upload(tmp_path: Path) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "XDG_STATE_HOME": str(tmp_path / "state"),
        }
        s3 = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name=REGION,
        )
        s3.create_bucket(Bucket="mine")
        archive = archive_file(tmp_path, os.urandom(40 << 20))
        told = ["--name", "t5", "--instance-type", "ml.c5.2xlarge", "--bucket", "mine", "--yes"]
        deploy = [str(archive), *told, "--role", ROLE, "--region", REGION, "--no-wait"]

        def start(*arguments: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, "-m", "handler", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        process = start("deploy", *deploy)
        assert process.stderr is not None
        written = []
        for line in process.stderr:
            written.append(line)
            if "uploaded " in line:
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "".join(written)
        assert len(s3.list_multipart_uploads(Bucket="mine").get("Uploads", ())) == 1

        process = start("delete", "t5", "--region", REGION, "--yes")
        told_out, told_err = process.communicate(timeout=120)
        assert process.returncode == 0, told_err
        assert "unfinished upload to s3://mine/djl-t5-handler/t5/" in told_out
        assert not s3.list_multipart_uploads(Bucket="mine").get("Uploads")

        process = start("deploy", *deploy)
        _, told_err = process.communicate(timeout=120)
        assert process.returncode == 0, told_err
        (stored,) = s3.list_objects_v2(Bucket="mine")["Contents"]
        assert stored["Size"] == archive.stat().st_size
    finally:
        server.stop()
