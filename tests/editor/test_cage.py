# SPDX-License-Identifier: Apache-2.0
"""The cage around sh: what a text of GRUB defaults cannot do, whoever runs emupmem and whatever confines it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TypeVar

import pytest

from emupmem.cli.main import main
from emupmem.editor import cage, cage_libc, cage_root, cage_rules
from emupmem.editor import defaults as editor_defaults
from emupmem.editor import shell as editor_shell
from emupmem.editor import text as editor_text
from emupmem.editor.cage_plan import Way
from emupmem.model import EmupmemError
from tests import PROJECT
from tests.fake import LOG, build
from tests.judge import here

SOURCE = str(PROJECT)
USER = 12345
ROOT = os.geteuid() == 0
T = TypeVar("T")


@pytest.fixture(autouse=True)
def alone(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """One of these at a time: the limit of processes counts all of nobody's, and one test uses them up.

    The cage is built in this process, whose parts the tests replace.
    """
    monkeypatch.setattr(editor_shell, "run_sh", here)
    base = tmp_path_factory.getbasetemp()
    with (base if worker_id == "master" else base.parent).joinpath("cage").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may write to, outside pytest's own, which is closed to other users."""
    folder = Path(mkdtemp(prefix="cage", dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def as_user(call: Callable[[], T]) -> T:
    """What a call gives, or raises, in a process of an ordinary user; what it imports must be there already."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            signal.alarm(120)
            os.close(reader)
            become_user()
            with os.fdopen(writer, "wb") as stream:
                stream.write(pickle.dumps(outcome(call)))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    result = pickle.loads(said)
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


def become_user() -> None:
    if ROOT:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0  # dumpable, as what a user starts is


def outcome(call: Callable[[], T]) -> T | BaseException:
    try:
        return call()
    except BaseException as exc:
        return exc


def emupmem(output: Path, *argv: str) -> object:
    """Run a command line with its output in a file; its exit status."""
    sys.stdout = sys.stderr = output.open("w")
    sys.argv = ["emupmem", *argv]
    try:
        main()
    except SystemExit as exc:
        return exc.code
    finally:
        sys.stdout.flush()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["root", pytest.param("user", marks=pytest.mark.slow)])
def test_a_dry_run_on_the_tree_of_another_machine_deletes_nothing(
    who: str, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = open_folder / "x" / "file"
    victim.parent.mkdir()
    victim.parent.chmod(0o777)
    victim.write_text("precious")
    victim.chmod(0o666)
    defaults = build(open_folder / "tree").root / "etc/default/grub"
    (open_folder / "boot.log").write_text(LOG)
    for name in ("stdout", "stderr", "argv"):  # put back what emupmem() changes
        monkeypatch.setattr(sys, name, getattr(sys, name))
    tree, log, said = str(open_folder / "tree"), str(open_folder / "boot.log"), open_folder / "said"
    argv = ["apply", "--root", tree, "--from", log, "--dry-run", "--size", "1G"]
    assert emupmem(said, *argv) == 0  # loads all modules, which a user may not read here
    said.chmod(0o666)
    defaults.write_text(f"/bin/rm -rf {victim.parent}\necho > {victim}\n{defaults.read_text()}")
    status = as_user(lambda: emupmem(said, *argv)) if who == "user" else emupmem(said, *argv)
    assert victim.exists(), "it is deleted"
    assert victim.read_text() == "precious"
    assert status == 0, said.read_text()
    assert "memmap=1G!" in said.read_text()


# Each way on its own -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prisoner:
    """Who runs sh, what confines it and which sh it is, in a folder that this user may change."""

    user: int
    folder: Path

    def reads(self, text: str, *, programs: bool) -> editor_shell.Sourced:
        """What sh makes of a text; as the ordinary user it is when that is who we are to be."""
        path = editor_shell.SH_PATH if programs else editor_shell.NO_PROGRAMS

        def call() -> editor_shell.Sourced:
            return editor_shell.run_sh([text.encode()], path)

        return as_user(call) if self.user == USER else call()

    def owns(self, path: Path) -> Path:
        if ROOT:
            os.chown(path, self.user if self.user == USER else cage_libc.NOBODY, -1)
        return path

    def left(self) -> list[str]:
        """Processes of this sh that are still there."""
        mark = os.fsencode(editor_shell.SH)
        lines = [line for p in Path("/proc").glob("[0-9]*/cmdline") if mark in (line := seen(p))]
        return [line.decode(errors="replace") for line in lines]


def seen(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


SHELLS = ("dash", "bash", "busybox")
CASES = [(way, shell) for way in ("namespaces", "landlock") for shell in SHELLS] + [("one by one", "dash")]
"""Of namespaces also as before Linux 5.12, where each mount is made read-only on its own."""
FIRST = (("namespaces", "dash"), ("landlock", "dash"))
"""Those of the inner loop."""


MINE = "root" if ROOT else "user"
"""Who runs the tests: the inner loop leaves the other out."""


@pytest.fixture(
    params=[w if w == MINE else pytest.param(w, marks=pytest.mark.slow) for w in ("root", "user")]
)
def user(request: pytest.FixtureRequest) -> int:
    if request.param == "root" and not ROOT:
        pytest.skip("needs root")
    return 0 if request.param == "root" else USER


@pytest.fixture(
    params=[c if c in FIRST else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
    ids=" ".join,
)
def prisoner(
    request: pytest.FixtureRequest, user: int, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Prisoner:
    kind, shell = request.param
    return imprisoned(kind, shell, user, open_folder, monkeypatch)


@pytest.fixture(params=["namespaces", "landlock"])
def dash(
    request: pytest.FixtureRequest, user: int, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Prisoner:
    return imprisoned(request.param, "dash", user, open_folder, monkeypatch)


def imprisoned(kind: str, shell: str, user: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Prisoner:
    """sh in one way and no other."""
    way = Way.LANDLOCK if kind == "landlock" else Way.NAMESPACES
    monkeypatch.setattr(cage, "WAYS", (way,))
    if kind == "one by one":
        monkeypatch.setattr(cage_root, "_MOUNT_SETATTR", 9999)
    program = shutil.which(shell, path="/usr/bin:/bin")
    if program is None:
        pytest.skip(f"no {shell} here")
    Path(folder, "sh").symlink_to(Path(program).resolve())
    monkeypatch.setattr(editor_shell, "SH", f"{folder}/sh")
    if not possible(kind, shell, user, way):
        pytest.skip(f"{way.value} cannot be had here")
    return Prisoner(user, folder)


had: dict[tuple[str, str, int], bool] = {}


def possible(kind: str, shell: str, user: int, way: Way) -> bool:
    """Whether this way confines this sh, as all is set now; found out once, wherever sh lies."""
    if (kind, shell, user) not in had:
        calls = [partial(cage.best, editor_shell.SH, programs=programs) for programs in (False, True)]
        ways = [as_user(call) if user == USER else call() for call in calls]
        had[kind, shell, user] = ways == [way, way]
    return had[kind, shell, user]


def picture(folder: Path) -> list[tuple[object, ...]]:
    """Everything that can be changed of what is in a folder."""
    found: list[tuple[object, ...]] = []
    for path in (folder, *sorted(folder.rglob("*"))):
        at = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found.append(
            (path, at.st_mode, at.st_uid, at.st_nlink, at.st_mtime_ns, at.st_size, at.st_ino, content)
        )
    return found


HARM = """
D=FOLDER F=FOLDER/F N=FOLDER/new
( : > $F )
echo x >> $F
echo x > $N
( : > /proc/self/root$F )
( : > /proc/1/root$F )
( : > /proc/PARENT/root$F )
( : > /proc/PARENT/cwd$F )
( : > /proc/$PPID/root$F )
for f in /proc/[0-9]*; do ( : > $f/root$F; : > $f/root$N ); done
( : > /dev/shm/NAME )
/bin/rm -rf $D
/bin/mv $F ${F}2
/bin/ln $F ${F}3
/bin/ln -s $F ${F}4
/bin/chmod 0777 $F
/bin/chmod 0700 $D
/usr/bin/truncate -s 0 $F
/usr/bin/touch $F $N
/bin/mkdir $N
/usr/bin/mkfifo $N
/bin/cp /bin/sh $N
busybox rm -rf $D
busybox touch $F
/usr/bin/chattr +i $F
/usr/bin/setfattr -n user.x -v 1 $F
/usr/bin/perl -e '($f, $n) = @ARGV; open(H, "+<", $f) and truncate(H, 0); utime(1, 1, $f);' $F $N
/usr/bin/perl -e '($f, $n) = @ARGV; rename($f, $n); unlink($f)' $F $N
/usr/bin/perl -e '($f, $n) = @ARGV; use Fcntl; sysopen(H, $f, O_RDONLY|O_TRUNC)' $F $N
/usr/bin/unshare -Urm /bin/sh -c "mount -o remount,rw /; mount -o bind,remount,rw /tmp; rm -rf $D"
/usr/bin/nsenter -t PARENT -m -U /bin/rm -rf $D
/bin/mount -o remount,rw /
sudo -n rm -rf $D
su root -c "rm -rf $D"
exec 9>&1
GRUB_CMDLINE_LINUX=done
"""


@pytest.mark.parametrize("programs", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_file_can_be_changed(prisoner: Prisoner, programs: bool) -> None:
    folder = prisoner.folder / "D"
    folder.mkdir()
    folder.chmod(0o777)
    file = folder / "F"
    file.write_text("precious\n")
    prisoner.owns(file).chmod(0o666)
    prisoner.owns(folder)
    text = HARM.replace("PARENT", str(os.getpid())).replace("NAME", folder.parent.name)
    text = text.replace("FOLDER", str(folder))
    before = picture(folder)
    result = prisoner.reads(text, programs=programs)
    assert picture(folder) == before
    assert not Path("/dev/shm", folder.parent.name).exists()
    assert not result.failed
    assert result.values[-1][editor_text.LINUX] == "done"


@pytest.mark.parametrize("programs", [False, True])
def test_a_file_of_the_caller_is_not_seen_from_another_machines_text(
    prisoner: Prisoner, programs: bool
) -> None:
    secret = prisoner.folder / "secret"
    secret.write_text("hidden\n")
    prisoner.owns(secret).chmod(0o600)
    text = (
        f"read GOT < {secret}\nread ENV < /proc/{os.getpid()}/environ\nread MEM < /proc/self/maps\n"
        f"ALL=$(echo /etc/* /proc/[0-9]*)\nCAT=$(/bin/cat {secret})\nBOX=$(busybox cat {secret})\n"
    )
    rest = prisoner.reads(text.replace("secret\n", "secret 2>/dev/null\n"), programs=programs).rest
    found = " ".join(rest.values())
    assert "PATH=" not in rest.get("ENV", "")
    if programs:
        assert "hidden" in rest["GOT"], "this machine's own texts may read what anybody may"
        assert "hidden" in rest["CAT"]
    else:
        assert "hidden" not in found
        assert "passwd" not in found
        assert str(os.getpid()) not in found


@pytest.mark.parametrize("programs", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_process_can_be_reached(prisoner: Prisoner, programs: bool) -> None:
    identity = {"user": prisoner.user or cage_libc.NOBODY} if ROOT else {}
    with subprocess.Popen(["/bin/sleep", "100"], **identity) as bystander:  # type: ignore[call-overload]
        text = f"kill -9 {bystander.pid}\n/bin/kill -9 {bystander.pid}\n( : > /proc/{bystander.pid}/oom_score_adj )\n"
        text += (
            f"/usr/bin/perl -MFcntl -e 'pipe(R, W); fcntl(R, 8, {bystander.pid}); fcntl(R, F_SETFL, 0x2000); "
        )
        text += "syswrite(W, 1)'\n"
        text += f"/usr/bin/perl -e 'kill 9, {bystander.pid}'\n/usr/bin/renice 19 {bystander.pid}\nA=1\n"
        result = prisoner.reads(text, programs=programs)
        assert result.rest["A"].strip("'") == "1"
        assert bystander.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, bystander.pid) == os.getpriority(os.PRIO_PROCESS, 0)
        bystander.kill()


PERL = """/usr/bin/perl -MSocket -e '
    for ([PF_UNIX, pack_sockaddr_un("FOLDER/socket")], [PF_UNIX, pack_sockaddr_un("\\0ABSTRACT")],
         [PF_INET, pack_sockaddr_in(PORT, inet_aton("127.0.0.1"))]) {
        socket(S, $_->[0], SOCK_STREAM, 0) and connect(S, $_->[1]) and print "in "; }'
"""


@pytest.mark.parametrize("programs", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_can_be_connected(prisoner: Prisoner, programs: bool) -> None:
    abstract = f"cage{os.getpid()}"
    with (
        socket.socket() as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        tcp.bind(("127.0.0.1", 0))
        unix.bind(f"{prisoner.folder}/socket")
        Path(prisoner.folder, "socket").chmod(0o777)
        hidden.bind(f"\0{abstract}")
        port = tcp.getsockname()[1]
        for listener in (tcp, unix, hidden):
            listener.listen()
            listener.setblocking(False)
        perl = (
            PERL.replace("FOLDER", str(prisoner.folder))
            .replace("ABSTRACT", abstract)
            .replace("PORT", str(port))
        )
        text = f"( exec 3<>/dev/tcp/127.0.0.1/{port}; echo x >&3 )\n( exec 3<>/dev/udp/127.0.0.1/{port} )\n"
        result = prisoner.reads(f"{text}GOT=$({perl})\n", programs=programs)
        assert "in" not in result.rest["GOT"]
        for listener in (tcp, unix, hidden):
            with pytest.raises(BlockingIOError):
                listener.accept()


LEFT = """
( while :; do :; done ) >/dev/null 2>&1 &
( trap '' 1 2 15; set -m; while :; do :; done & ) >/dev/null 2>&1
SLEEP >/dev/null 2>&1 &
/usr/bin/setsid SLEEP >/dev/null 2>&1 &
/usr/bin/nohup /usr/bin/setsid -f SLEEP >/dev/null 2>&1
/usr/bin/perl -e 'fork and exit; use POSIX; POSIX::setsid(); fork and exit; exec "SLEEP"' >/dev/null 2>&1
A=1
"""


@pytest.mark.slow
@pytest.mark.parametrize("programs", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_outlives_sh(prisoner: Prisoner, programs: bool) -> None:
    sleep = f"/bin/sleep 100.{os.getpid()}"
    result = prisoner.reads(LEFT.replace("SLEEP", sleep), programs=programs)
    assert result.rest["A"].strip("'") == "1"
    assert gone(lambda: not prisoner.left())
    asleep = sleep.replace(" ", "\0").encode()
    assert gone(lambda: not any(asleep in seen(p) for p in Path("/proc").glob("[0-9]*/cmdline")))


def gone(so: Callable[[], bool]) -> bool:
    """Whether it is so soon: what was killed takes a moment to go."""
    end = time.monotonic() + 5
    while not so() and time.monotonic() < end:
        time.sleep(0.1)
    return so()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("f() { f | f & f & }\nf\nwhile :; do :; done\n", "did not finish|sh cannot read"),
        *(
            pytest.param(text, words, marks=pytest.mark.slow)
            for text, words in (
                ("A=xxxxxxxxxxxxxxxx\nwhile :; do A=$A$A; done\n", "did not finish|sh cannot read"),
                (
                    "A=xxxxxxxxxxxxxxxxxxx\nwhile :; do echo $A$A$A$A$A$A$A$A >&2; done\n",
                    "prints without|did not",
                ),
                ("exec 1>&- 2>&-\nwhile :; do :; done\n", "did not finish"),
            )
        ),
    ],
)
def test_the_machine_goes_on_whatever_eats_it(
    dash: Prisoner, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor_shell, "SH_SECONDS", 0.5)
    monkeypatch.setattr(cage, "MOST_OUTPUT", 1 << 20)
    call = partial(editor_defaults.effective, [("f", text)], sh=editor_shell.judge(with_programs=False))
    with pytest.raises(EmupmemError, match=words):
        as_user(call) if dash.user == USER else call()
    assert gone(lambda: not dash.left())


@pytest.mark.slow
def test_a_subshell_that_cannot_be_had_is_a_refusal(dash: Prisoner) -> None:
    """sh itself goes on, with values that grub-mkconfig would not see."""
    text = f'GRUB_CMDLINE_LINUX="a{"$(" * 300}echo b{")" * 300}"\n'
    result = dash.reads(text, programs=False)
    assert "fork" in result.failed
    assert not dash.reads(
        text.replace("$(" * 300, "$(" * 30).replace(")" * 300, ")" * 30), programs=False
    ).failed


def test_sh_has_no_rights_left(prisoner: Prisoner) -> None:
    text = "while read -r NAME VALUE REST; do case $NAME in Cap[EPIA]*|NoNew*|Seccomp:|Uid:)\n"
    text += 'GOT="$GOT$NAME$VALUE "; esac; done < /proc/self/status\n'
    got = prisoner.reads(text, programs=True).rest["GOT"].strip("'").split()
    none = "0" * 16
    assert f"CapPrm:{none}" in got
    assert f"CapEff:{none}" in got
    assert f"CapAmb:{none}" in got
    assert {"NoNewPrivs:1", "Seccomp:2", f"Uid:{prisoner.user or cage_libc.NOBODY}"} <= set(got)


# Which way is taken ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_root_of_a_container_that_may_not_mount_still_has_a_cage() -> None:
    code = (
        "from emupmem.editor import cage, shell\nimport sys\n"
        "for programs in (False, True):\n"
        "    assert cage.best('/bin/sh', programs=programs) is not None\n"
        "    shell.run_sh([b'A=1'], shell.SH_PATH if programs else shell.NO_PROGRAMS)\n"
    )
    argv = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=SOURCE)
    assert done.returncode == 0, done.stderr


def test_a_cage_that_breaks_at_run_time_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch, open_folder: Path
) -> None:
    """Never the same text without a cage."""
    way = cage.best(editor_shell.SH, programs=True)
    if way is None:
        pytest.skip("no cage can be had here")

    def broken(plan: object) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr(cage, "_enter", broken)
    with pytest.raises(EmupmemError, match="cannot run sh to check the GRUB settings"):
        editor_shell.run_sh([f"/usr/bin/touch {open_folder}/new\n".encode()])
    assert not (open_folder / "new").exists()


def test_what_does_not_work_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    if cage.best(editor_shell.SH, programs=False) is None:
        pytest.skip("no cage can be had here")
    cage._works.cache_clear()
    monkeypatch.setattr(cage_root, "_SPACES", -1)  # no kernel knows them
    assert cage.best(editor_shell.SH, programs=False) in (Way.LANDLOCK, None)
    monkeypatch.setattr(cage_rules, "LANDLOCK_CREATE_RULESET", 9999)
    cage._works.cache_clear()
    assert cage.best(editor_shell.SH, programs=False) is None
    monkeypatch.undo()
    cage._works.cache_clear()


# No cage at all --------------------------------------------------------------------------------------------------

PLAIN = """# Defaults `of` $(GRUB)

GRUB_DEFAULT=0
  GRUB_TIMEOUT=5   # seconds
export GRUB_DISTRIBUTOR='Debian
GNU'
GRUB_CMDLINE_LINUX_DEFAULT="quiet \\"splash\\" acpi_osi='!Windows 2012'"
GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX_DEFAULT ${GRUB_DEFAULT} a\\$b"
SUSE_BTRFS_SNAPSHOT_BOOTING=true
GRUB_X="a"b'c'\\ d"""


@pytest.fixture
def no_cage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage, "WAYS", ())


@pytest.mark.parametrize("programs", [False, True])
@pytest.mark.usefixtures("no_cage")
def test_without_a_cage_plain_assignments_are_read(programs: bool, user: int) -> None:
    judge = editor_shell.judge(with_programs=programs)

    def call() -> tuple[str, editor_defaults.GrubFile]:
        return editor_defaults.set_items(
            PLAIN, editor_text.LINUX, ["1G!4G"], sh=judge
        ), editor_defaults.read_grub_file(PLAIN, sh=judge)

    changed, read = as_user(call) if user == USER else call()
    assert "memmap=1G!4G" in changed
    assert read.linux.value == "quiet \"splash\" acpi_osi='!Windows 2012' 0 a$b"


@pytest.mark.parametrize(
    "line",
    [
        "/bin/rm -rf /home/me/x",
        "GRUB_DISTRIBUTOR=`lsb_release -i -s`",
        'GRUB_DISTRIBUTOR="$(lsb_release -i -s)"',
        'GRUB_X="${GRUB_Y:-$(id)}"',
        "GRUB_X=1 id",
        "GRUB_X=1; id",
        "GRUB_X=1&id",
        "GRUB_X=1|id",
        "GRUB_X=1>/tmp/x",
        "GRUB_X=<(id)",
        "GRUB_X=(a b)",
        "GRUB_X=$((1))",
        "GRUB_X[0]=1",
        "GRUB_X+=1",
        "> /tmp/x",
        ". /etc/os-release",
        "if true; then id; fi",
        "GRUB_X='a",
        'GRUB_X="a',
        "GRUB_X=~",
        "GRUB_X=1#`id`\r",
        "GRUB_X=\\\nid",
        "RANDOM='a[$(id)]'",
        "PATH=/tmp",
        "IFS=x",
        "trap id 0",
        "readonly GRUB_X",
        "GRUB_X=1 \t\fid",
        "\xa0id",
    ],
)
@pytest.mark.usefixtures("no_cage")
def test_without_a_cage_everything_else_is_refused_with_its_line(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cage, "run_in_cage", lambda *_: pytest.fail("sh was started"))
    texts = [("a", PLAIN), ("b", f"# b\nGRUB_A=1\n{line}\nGRUB_B=1\n")]
    with pytest.raises(
        EmupmemError, match=r"^b:3: .* more than a plain assignment, and sh cannot be kept"
    ) as caught:
        editor_defaults.effective(texts)
    assert line.partition("\n")[0].strip()[:20].strip() in caught.value.message
    assert "Landlock" in caught.value.hint
    with pytest.raises(EmupmemError, match=r"^b:3: "):
        editor_defaults.set_items(texts[1][1], editor_text.LINUX, ["1G!4G"], filename="b")


# The filter ------------------------------------------------------------------------------------------------------


def test_the_numbers_of_system_calls_are_those_of_the_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if os.uname().machine != "x86_64" or not header.exists():
        pytest.skip("no headers of the kernel for x86_64 here")
    known = {
        words[1]: int(words[2]) for line in header.read_text().splitlines() if len(words := line.split()) == 3
    }
    for name, number in cage_rules.syscall_numbers().items():
        assert known.get(f"__NR_{name}", number) == number, name
