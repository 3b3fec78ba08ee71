"""Images of one camera are decoded one by one, so that no camera takes all threads."""

import gc
import threading
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest

from occbev.streams.decode_pool import DecodePool


def test_slow_images_of_one_camera_do_not_hold_up_another() -> None:
    pool: DecodePool[int] = DecodePool(2)
    release = threading.Event()
    slow = [pool.submit("slow", lambda: (release.wait(10), 1)[1]) for _ in range(4)]
    quick = [pool.submit("quick", lambda i=i: i) for i in range(20)]
    assert [future.result(timeout=5) for future in quick] == list(range(20))
    assert pool.count("slow") == 4
    assert not any(future.done() for future in slow)
    release.set()
    assert [future.result(timeout=5) for future in slow] == [1] * 4
    pool.close()


def test_images_of_a_camera_come_out_in_order_and_failures_stay_their_own() -> None:
    pool: DecodePool[int] = DecodePool(3)
    order: list[int] = []

    def decode(number: int) -> int:
        order.append(number)
        return 6 // number

    futures = [pool.submit("front", lambda n=n: decode(n)) for n in (3, 0, 2)]
    assert futures[2].result(timeout=5) == 3
    assert order == [3, 0, 2]
    assert isinstance(futures[1].exception(), ZeroDivisionError)
    pool.close()


def test_images_that_wait_are_cancelled_when_the_pool_closes() -> None:
    pool: DecodePool[int] = DecodePool(1)
    started, release = threading.Event(), threading.Event()

    def decode() -> int:
        started.set()
        return int(release.wait(10))

    first, second = pool.submit("front", decode), pool.submit("front", lambda: 2)
    assert started.wait(5)
    pool.close()
    release.set()
    assert first.result(timeout=5) == 1
    with pytest.raises(CancelledError):
        second.result(timeout=5)


def test_a_failed_image_is_freed_with_its_future() -> None:
    pool: DecodePool[int] = DecodePool(1)

    def fail(image: np.ndarray) -> int:
        raise ValueError(f"bad image of {image.size} bytes")

    image = np.zeros(1000, np.uint8)
    alive = weakref.ref(image)
    gc.disable()
    try:
        future = pool.submit("front", lambda image=image: fail(image))
        assert future.exception(timeout=5) is not None
        pool.submit("front", lambda: 1).result(timeout=5)  # the thread lets go of the one before
        del future, image
        assert alive() is None
    finally:
        gc.enable()
        pool.close()
