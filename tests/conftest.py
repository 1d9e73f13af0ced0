"""What tests of several folders share: the embedded model and tokenizers.

Heavy modules are imported by the fixtures that need them, so that tests of pure modules start at once.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's kernels run interpreted. The choice is read when triton is first imported, which the
    # models of transformers do too; it is undone at once, so that no process started by a test inherits it.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]

if TYPE_CHECKING:
    from engine.text import Tokenizer


@pytest.fixture(scope="session")
def compiler() -> str:
    """Path of the C++ compiler that the kernels are built with; without one, what needs them is skipped by name."""
    from baton.native import COMPILERS

    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no C++ compiler ({' or '.join(COMPILERS)}): compiled code is NOT tested here")
    return found


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The embedded model as a Hugging Face folder; fetched and converted once per machine."""
    from engine.hub import resolve

    return resolve("smollm2-135m-instruct", Path("~/.cache/baton").expanduser())


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    from engine.text import Tokenizer

    return Tokenizer(model_folder)


@pytest.fixture(scope="session")
def byte_fallback_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that spells unknown characters with byte tokens, as those of Llama 2 and Mistral do."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Compiled
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "你", "\ufffd"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    compiled = Compiled(
        models.BPE(
            {token: index for index, token in enumerate(vocabulary)},
            [("▁", "a"), ("▁", "b"), ("▁a", "b"), ("a", "b")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    compiled.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    compiled.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    compiled.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    folder = tmp_path_factory.mktemp("byte-fallback")
    PreTrainedTokenizerFast(tokenizer_object=compiled, eos_token="</s>").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def byte_fallback(byte_fallback_folder: Path) -> Tokenizer:
    from engine.text import Tokenizer

    return Tokenizer(byte_fallback_folder)


class Signed:
    """An authority's folder: ``ca``, and files named after whoever it signed for, at 127.0.0.1 and localhost."""

    def __init__(self, folder: Path, name: str) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        self._folder, self._name = folder, x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.ca = self._sign("ca", self._name, self._key, authority=True)

    def pair(self, name: str) -> tuple[str, str]:
        """Paths of a certificate for ``name`` and of its key."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        private = self._folder / f"{name}.key"
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        return self._sign(name, subject, key, authority=False), str(private)

    def _sign(self, file: str, subject: Any, key: Any, *, authority: bool) -> str:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
        certificate = (
            builder.not_valid_before(now - day).not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )  # fmt: skip
        path = self._folder / f"{file}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Signed]:
    """A function that makes a certificate authority of that name."""
    return lambda name: Signed(tmp_path_factory.mktemp("signed"), name)
