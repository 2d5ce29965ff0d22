"""A student and a served teacher: the same knowledge, waiting, refusals."""

import contextlib
import http.client
import json
import socket
import threading
import time
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from detdistill.data.records import DetectionSet
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.serving import client, listener, messages
from detdistill.serving.client import ServedTeacher, read_url
from detdistill.serving.listener import Listener, read_address
from detdistill.serving.messages import ServingError, packed_question
from tests.methods.contract_checks import MIDDLE, assert_same
from tests.serving.near import CLASSES, connected, mixed_batch, passes_of, serving
from tests.tiny import TinyDense, TinyQueries, tiny_batch

FAMILIES = {
    "pkd": TinyDense,
    "cwd,on=logits": TinyDense,
    "lad": TinyDense,
    "unikd,queries=6": TinyDense,
    "fgd+cwd,on=logits+pkd": TinyDense,
    "kd_detr,general_points=0": TinyQueries,
    "detrdistill": TinyQueries,
}


def learner(text, served, kind=TinyDense):
    """A student, and its method without a teacher."""
    torch.manual_seed(3)
    student = kind(seed=2)
    return student, build_method(text, served.teacher(), student)


@pytest.mark.parametrize(("text", "kind"), FAMILIES.items(), ids=FAMILIES)
def test_a_served_teacher_says_what_one_in_this_process_says(text, kind):
    teacher, batch = Teacher(kind(seed=1)), mixed_batch(4)
    with serving(text, teacher, kind(seed=2)) as near:
        served = connected(near)
        student, method = learner(text, served, kind)
        source = served.source(text, method)
        torch.manual_seed(3)
        online = build_method(text, teacher, kind(seed=2))
        online.load_state_dict(method.state_dict())
        near.lecture.method.load_state_dict(method.state_dict())  # networks that were trained first, where there are some
        for mine, theirs in zip(method.stages(student), online.stages(student), strict=True):
            if mine.learns_from is None:
                continue
            assert_same(source(mine.learns_from, batch), teach_by_canvas(theirs.learns_from, batch), text, rtol=1e-6, atol=1e-6)
            losses = []
            for stage, taught in ((mine, source(mine.learns_from, batch)), (theirs, teach_by_canvas(theirs.learns_from, batch))):
                torch.manual_seed(4)
                losses.append(stage.step(batch, taught, MIDDLE).terms)
            assert losses[0]
            assert_same(losses[0], losses[1], text, rtol=1e-6, atol=1e-6)


def test_a_teacher_that_sees_larger_images_teaches_in_the_student_s_view():
    teacher = Teacher(TinyDense(seed=1))
    batch = replace(tiny_batch(2, size=32), large=tiny_batch(2, size=64), enlarged=2.0)
    with serving("pkd", teacher) as near:
        served = connected(near)
        _, method = learner("pkd", served)
        online = build_method("pkd", teacher, TinyDense(seed=2))
        assert_same(served.source("pkd", method)(method, batch), teach_by_canvas(online, batch), "", rtol=1e-6, atol=1e-6)


def test_a_student_may_learn_from_a_part_of_what_is_taught():
    with serving("cwd,on=logits+pkd") as near:
        served = connected(near)
        _, method = learner("fgd", served)
        taught = served.source("fgd", method)(method, tiny_batch(2))
        assert taught.prediction is None
        with pytest.raises(ServingError, match=r"unikd learns from unikd,.*, it teaches features and prediction \+ features"):
            served.check("unikd", data_set(), ViewSettings(), None)


def test_fewer_bytes_are_sent_when_the_server_rounds():
    batch, sizes = tiny_batch(4), {}
    for store in ("float32", "int8"):
        with serving(store=store) as near:
            served = connected(near)
            sizes[store] = sum(len(record.data) for record in served._records(batch))
            _, method = learner("pkd", served)
            taught = served.source("pkd", method)(method, batch)
    assert sizes["int8"] < 0.5 * sizes["float32"]
    assert taught.features.maps[0].dtype == torch.float32


def test_several_students_share_the_teacher_s_passes():
    teacher = Teacher(TinyDense(seed=1))
    batches = [tiny_batch(2, seed=seed) for seed in range(6)]
    with serving("pkd", teacher, batch=8) as near:
        seen, going = held(near)
        answers, threads = {}, []

        def learn(number):
            served = connected(near)
            _, method = learner("pkd", served)
            answers[number] = served.source("pkd", method)(method, batches[number])

        for number in range(6):
            threads.append(threading.Thread(target=learn, args=(number,)))
            threads[-1].start()
            until(lambda number=number: len(seen) == 1 and len(near.passes._queue) == number)
        going.set()
        for thread in threads:
            thread.join(20)
    online = build_method("pkd", teacher, TinyDense(seed=2))
    for number, batch in enumerate(batches):
        assert_same(answers[number], teach_by_canvas(online, batch), "", rtol=1e-6, atol=1e-6)
    assert [len(batch) for batch in seen] == [2, 8, 2], "the first alone, then as many as allowed"


def test_a_large_batch_is_taught_in_parts_and_canvases_are_kept_apart():
    with serving(batch=2) as near:
        seen = passes_of(near.lecture)
        near.passes.teach = near.lecture.teach
        batch = mixed_batch(5)
        served = connected(near)
        _, method = learner("pkd", served)
        taught = served.source("pkd", method)(method, batch)
        assert sorted(seen) == [1, 2, 2]
        assert_same(taught, teach_by_canvas(near.lecture.method, batch), "", rtol=1e-6, atol=1e-6)


def held(near):
    """The batches of the teacher's passes, none of which ends before the event."""
    seen, going, before = [], threading.Event(), near.passes.teach

    def teach(batch):
        seen.append(batch)
        going.wait(10)
        return before(batch)

    near.passes.teach = teach
    return seen, going


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


# -------------------------------------------------------------------------------------------------------------- waiting


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(listener, "PATIENCE", 0.01)
    monkeypatch.setattr(listener, "COME_BACK", 0)


def test_a_full_queue_is_waited_for(impatient):
    said = []
    with serving(queue=1) as near:
        served = connected(near, say=said.append)
        _, method = learner("pkd", served)
        near.places.acquire()
        status = raw(near, "POST", messages.TEACH, b"x")
        assert status[0] == 503
        assert status[2]["Retry-After"] == "0"
        threading.Timer(0.3, near.places.release).start()
        taught = served.source("pkd", method)(method, tiny_batch(2))
    assert taught.features.maps[0].shape[0] == 2
    assert said == [f"waiting for the served teacher {near.url} (the teacher is busy)"]


def test_a_queue_that_stays_full_ends_in_one_line(impatient):
    with serving(queue=1) as near:
        served = connected(near, timeout=0.3)
        near.places.acquire()
        with pytest.raises(
            ServingError, match=r"no answer for 0\.3 s \(the teacher is busy\); start `detdistill teach` there or"
        ):
            served._records(tiny_batch(1))
        near.places.release()


def test_a_server_that_comes_back_is_used_again_and_another_one_is_not(impatient):
    teacher, batch = Teacher(TinyDense(seed=1)), tiny_batch(2)
    with serving("pkd", teacher) as near:
        served = connected(near)
        _, method = learner("pkd", served)
        source, where = served.source("pkd", method), near.url.removeprefix("http://")
        before = source(method, batch)
    served.ahead(batch)
    time.sleep(0.1)  # it is asked while nobody is there
    with serving("pkd", teacher, listen=where) as again:
        assert_same(source(method, batch), before, "")
        assert again.passes.passes == 1
    with (
        serving("pkd", Teacher(TinyDense(seed=9)), listen=where),
        pytest.raises(ServingError, match="was started again with another teacher, method"),
    ):
        source(method, batch)


def test_a_student_that_dies_does_not_disturb_the_others():
    question = packed_question([tiny_batch(2)], "")
    with serving(queue=1) as near:
        for content in (question[:100], question):  # in the middle of its question, and before its answer
            with socket.create_connection(near.listener.server_address[:2]) as gone:
                head = f"POST {messages.TEACH} HTTP/1.1\r\nContent-Length: {len(question)}\r\n"
                gone.sendall(f"{head}{messages.CHECKSUM}: {zlib.crc32(question):08x}\r\n\r\n".encode() + content)
        assert len(connected(near)._records(tiny_batch(2))) == 2


def test_images_on_which_the_teacher_fails_are_refused_alone():
    with serving(batch=8) as near:
        before, found = near.passes.teach, {}

        def teach(batch):
            if 100 in batch.ids:
                raise RuntimeError("CUDA out of\nmemory")
            return before(batch)

        near.passes.teach = teach
        seen, going = held(near)

        def ask(seed):
            try:
                found[seed] = connected(near)._records(tiny_batch(1, seed=seed))
            except ServingError as error:
                found[seed] = str(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in (0, 1, 2)]
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda number=number: len(seen) == 1 and len(near.passes._queue) == number)
        going.set()
        for thread in threads:
            thread.join(20)
    assert found[1] == f"served teacher {near.url} refuses (500): the teacher failed on these images: CUDA out of memory"
    assert [len(found[seed]) for seed in (0, 2)] == [1, 1]


def test_what_was_asked_ahead_is_not_asked_again_and_what_was_not_used_is_forgotten():
    batches = [tiny_batch(1, seed=seed) for seed in range(8)]
    with serving() as near:
        served = connected(near)
        for batch in batches:
            served.ahead(batch)
        assert len(served._asked) == client.KEPT
        for batch in batches[-2:]:
            served._records(batch)
        assert not served._asked
        until(lambda: near.passes.images == 8)
        served._records(batches[0])
        assert near.passes.images == 9


# ------------------------------------------------------------------------------------------------------------- refusals


def raw(near, verb, path, body=None, **headers):
    """A request by hand: status, text, headers."""
    connection = http.client.HTTPConnection(*near.listener.server_address[:2], timeout=10)
    sums = {} if body is None else {messages.CHECKSUM: f"{zlib.crc32(body):08x}"}
    with contextlib.closing(connection):
        connection.request(verb, path, body, {**sums, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers


def test_malformed_requests_get_one_line_each():
    question = packed_question([tiny_batch(1)], "")
    with serving() as near:
        damaged = raw(near, "POST", messages.TEACH, question, **{messages.CHECKSUM: "00000000"})
        assert damaged[:2] == (400, "the question is damaged or malformed: its checksum is wrong\n")
        status, text, _ = raw(near, "POST", messages.TEACH, b"\x80\x04cos\nsystem\n(S'true'\ntR.")  # a pickle
        assert status == 400
        assert text.count("\n") == 1
        assert raw(near, "POST", messages.TEACH, b"", **{"Content-Length": "x"})[0] == 411
        assert raw(near, "POST", messages.TEACH, b"", **{"Content-Length": str(1 << 40)})[:2] == (
            413,
            f"a question of {1 << 40} bytes is larger than {messages.LARGEST_BODY}; lower --batch or --size of the student\n",
        )
        for verb, path in (("GET", "/"), ("GET", "/../../etc/passwd"), ("GET", "/stages/x.safetensors"), ("POST", "/x")):
            assert raw(near, verb, path, b"" if verb == "POST" else None)[:2] == (404, "there is no such page\n")
        assert raw(near, "DELETE", "/")[0] == 501
        with socket.create_connection(near.listener.server_address[:2]) as connection:
            connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
            assert b"Traceback" not in connection.recv(1000)
        assert len(connected(near)._records(tiny_batch(1))) == 1, "it goes on"


def test_the_token_is_demanded_when_there_is_one():
    with serving(token="secret") as near:
        assert raw(near, "GET", messages.DESCRIPTION)[0] == 401
        assert raw(near, "POST", messages.TEACH, b"x", Authorization="Bearer secre")[0] == 401
        for wrong in ({}, {"token": "other"}):
            with pytest.raises(
                ServingError, match=r"refuses \(401\): the token is missing or wrong; set DETDISTILL_TOKEN to that"
            ):
                connected(near, **wrong)
        assert len(connected(near, token="secret")._records(tiny_batch(1))) == 1


@pytest.mark.parametrize("token", ["with blanks", "zürich", "a\nb"])
def test_a_token_that_no_header_can_hold_is_refused(token, monkeypatch):
    monkeypatch.setenv(messages.TOKEN, token)
    with pytest.raises(ServingError, match="DETDISTILL_TOKEN may hold letters, digits and signs only"):
        messages.token_from_environment()


def test_nobody_at_the_address_is_said_after_the_time_limit(impatient):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            ServingError, match=rf"served teacher {url}: no answer for 0\.2 s \(.*refused\); start `detdistill teach`"
        ):
            ServedTeacher(url, 0.2)


@pytest.fixture
def stranger():
    """A server of something else; its answer may be set."""

    class Strange(BaseHTTPRequestHandler):
        content = b"<html>hello</html>"

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.content)

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Strange) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", Strange
        found.shutdown()
        thread.join()


def test_something_else_and_another_version_at_the_address_are_named(stranger):
    url, strange = stranger
    with pytest.raises(ServingError, match=r"what answers there is no `detdistill teach`; check host and port"):
        ServedTeacher(url, 5)
    with serving() as near:
        packed = near.description.packed
        content = json.loads(packed())["content"] | {"protocol": 7, "version": "9.9"}
    strange.content = messages.sealed(content)
    with pytest.raises(ServingError, match=r"it is detdistill 9\.9 \(protocol 7\), this is .* \(protocol 1\); install the same"):
        ServedTeacher(url, 5)


def data_set(classes=CLASSES):
    return DetectionSet.of("train", "coco", None, classes, [])


def test_what_does_not_fit_is_listed_in_one_line():
    with serving() as near:
        served = connected(near)
        near_classes = near.description.classes
        served.check("fgd+pkd", data_set(near_classes), ViewSettings(colour=0.5), None)
        with pytest.raises(ServingError) as caught:
            served.check("cwd,on=logits", data_set(("cat",)), ViewSettings(), Teacher(TinyDense(seed=9)))
    assert str(caught.value) == (
        f"served teacher {near.url} does not fit: its teacher (runs/teacher) is not that of --teacher; cwd,on=logits learns from "
        f"features and prediction, it teaches features (--method pkd); it teaches the classes {', '.join(near_classes)}, the "
        "data have cat (start it with --data)"
    )


@pytest.mark.parametrize("listen", ["8765", "localhost", ":8765", "a:b", "a:99999", "a:-1", "127.0.0.1:"])
def test_addresses_that_are_none_are_refused(listen):
    with pytest.raises(ServingError, match=r"is not HOST:PORT; write e\.g\. 127\.0\.0\.1:8765"):
        read_address(listen)


def test_a_port_that_is_taken_and_a_host_that_is_not_here_are_named():
    with serving() as near:
        port = near.listener.server_port
        with pytest.raises(ServingError, match=rf"cannot listen at 127\.0\.0\.1:{port}: port {port} is taken by another process"):
            Listener(f"127.0.0.1:{port}")
    with pytest.raises(ServingError, match=r"cannot listen at 203\.0\.113\.7:8765: "):
        Listener("203.0.113.7:8765")
    assert read_address("[::1]:80") == ("::1", 80)


@pytest.mark.parametrize("url", ["ftp://a:1", "http://", "http://a:b", "http://a:1/folder", "http://a:1#x", "s3://bucket/x"])
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(ServingError, match="is no address of a served teacher; write http://HOST:PORT"):
        read_url(url)


def test_urls_may_lack_http_and_never_hold_a_password():
    assert read_url("gpu1:8765/") == "http://gpu1:8765"
    assert read_url("https://gpu1") == "https://gpu1"
    for url in ("http://me:SECRET@gpu1:8765", "http://gpu1:8765?token=SECRET"):
        with pytest.raises(ServingError, match="set DETDISTILL_TOKEN on both sides") as caught:
            read_url(url)
        assert "SECRET" not in str(caught.value)


def test_a_server_that_ends_closes_its_port_and_may_be_stopped_twice():
    with serving() as near:
        address = near.listener.server_address[:2]
        served = connected(near)
        near.stop()
        assert near.in_words() == "0 images taught in 0 passes"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    until(lambda: not near.listener.open)
    assert served.about.spec == near.description.about.spec
