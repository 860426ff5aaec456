"""Short texts of several domains, written for this project, on which tokenizers are compared."""

_PROSE = """\
The ferry left an hour late because the captain's dog had fallen asleep on the mooring rope, and nobody on the quay had
the heart to wake him. By the time he stretched, yawned and wandered off towards the fish stalls, the wind had turned.
"We'll be rowing the last mile," said the mate, who had been looking forward to his dinner. Mrs. Abernathy, the only
passenger in first class, didn't mind at all: she had brought two novels, a flask of tea and a letter that she wasn't
sure she wanted to finish writing. Outside the harbour the swell grew longer and greener. A line of pelicans went by,
low over the water, each one flapping only when the bird in front of it did. It was, she decided, exactly the kind of
afternoon on which people make decisions they later describe as sudden, although they have been years in the making.
"""

_CODE = '''\
from collections.abc import Iterator


class Inventory:
    """Counts items by name."""

    def __init__(self, limit: int = 100) -> None:
        self._counts: dict[str, int] = {}
        self.limit = limit

    def add(self, name: str, n: int = 1) -> int:
        if n <= 0:
            raise ValueError(f"cannot add {n} of {name!r}")
        self._counts[name] = min(self._counts.get(name, 0) + n, self.limit)
        return self._counts[name]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for name, count in sorted(self._counts.items()):
            if count != 0 and not name.startswith("_"):
                yield name, count


def main() -> None:
    stock = Inventory(limit=12)
    for i in range(3):
        stock.add("screws", n=2**i)
    print("\\n".join(f"{name:<10} {count:>4d}" for name, count in stock))


if __name__ == "__main__":
    main()
'''

_MATHS = r"""\
Let $f(x) = x^3 - 6x^2 + 9x + 1$. Then $f'(x) = 3x^2 - 12x + 9 = 3(x - 1)(x - 3)$, so that $f$ has a local maximum at
$x = 1$ with $f(1) = 5$ and a local minimum at $x = 3$ with $f(3) = 1$. The second derivative $f''(x) = 6x - 12$ is 0 at
$x = 2$, where $f(2) = 3$. Integrating over $[0, 4]$ we get
\begin{equation}
  \int_0^4 f(x)\,dx = \left[ \tfrac{1}{4}x^4 - 2x^3 + \tfrac{9}{2}x^2 + x \right]_0^4 = 64 - 128 + 72 + 4 = 12.
\end{equation}
A shop sells 48 boxes of 125 nails at $3.20 a box and 37 boxes of 250 nails at $5.85. Together that is
48 * 125 + 37 * 250 = 6000 + 9250 = 15250 nails for 48 * 3.20 + 37 * 5.85 = 153.60 + 216.45 = 370.05 dollars, or about
0.0243 dollars a nail. For all $n \ge 1$: $\sum_{k=1}^{n} k^2 = \frac{n(n+1)(2n+1)}{6}$; for $n = 1024$ it is 358438400.
"""

_GERMAN = """\
Der Zug hielt auf freier Strecke, und niemand wußte, warum. Draußen lag Schnee über den Feldern, so glatt und
unberührt, daß man die Entfernungen nicht mehr schätzen konnte. Im Abteil gegenüber packte eine ältere Frau belegte
Brote aus und reichte eines davon, ohne zu fragen, dem Studenten am Fenster. „Das dauert“, sagte sie, „bei der Kälte
frieren die Weichen ein.“ Er bedankte sich höflich und überlegte, ob die Geschwindigkeitsbegrenzung, von der gestern in
den Nachrichten die Rede gewesen war, wohl auch für verspätete Züge galt. Zwanzig Minuten später ging ein Ruck durch
die Wagen, die Heizung begann wieder zu klopfen, und langsam zogen die ersten Häuser der Vorstadt vorüber.
"""

_KOREAN = """\
어제 저녁에는 비가 많이 와서 우리는 시장에 가지 못했다. 대신 할머니께서 부엌에 있던 감자와 양파로
따뜻한 국을 끓여 주셨다. 동생은 창가에 앉아 빗소리를 들으며 그림을 그렸고, 나는 오래된 책을 한 권
꺼내 읽기 시작했다. 책 속에는 작은 섬에 사는 등대지기와 그의 고양이 이야기가 들어 있었다. 밤이
깊어지자 비가 그치고 하늘에 별이 하나둘 보였다. 내일은 날씨가 맑으면 모두 함께 바닷가로 산책을
가기로 했다.
"""

_MARKUP = """\
<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>Tide tables &amp; opening hours</title>
  <link rel="stylesheet" href="/static/style.css?v=42">
</head>
<body class="page page--narrow">
  <h1 id="tides">Tides for the <em>old harbour</em></h1>
  <table>
    <tr><th scope="col">Day</th><th scope="col">High</th><th scope="col">Low</th></tr>
    <tr><td>Monday</td><td>06:14</td><td>12:31</td></tr>
    <tr><td>Tuesday</td><td>07:02</td><td>13:20</td></tr>
  </table>
  <p>Write to <a href="mailto:harbour@example.org">the office</a> or read the <a href="notes.html#winter">notes</a>.</p>
  <img src="img/quay.jpg" alt="The quay at low water" width="640" height="360">
</body>
</html>
"""

DOMAIN_SAMPLES = {
    "English prose": _PROSE,
    "Python code": _CODE,
    "mathematics": _MATHS,
    "German": _GERMAN,
    "Korean": _KOREAN,
    "HTML": _MARKUP,
}
