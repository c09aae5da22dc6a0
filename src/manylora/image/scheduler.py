"""Which pictures are made together. First come, first served; knows no tensor and no adapter."""

from collections.abc import Collection

from manylora.image.request import ImageRequest


class ImageScheduler:
    """The waiting pictures. The oldest is always in the next batch, so none waits for ever."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._waiting: list[ImageRequest] = []

    @property
    def waiting(self) -> Collection[ImageRequest]:
        """In order of arrival."""
        return tuple(self._waiting)

    def add(self, request: ImageRequest) -> None:
        self._waiting.append(request)

    def next_batch(self) -> list[ImageRequest]:
        """Return the oldest picture and those that can share its passes, oldest first; they wait on until removed."""
        if not self._waiting:
            return []
        key = self._waiting[0].batch_key
        return [request for request in self._waiting if request.batch_key == key][: self._max_batch]

    def remove(self, request: ImageRequest) -> None:
        """A picture has begun or ended."""
        self._waiting.remove(request)
