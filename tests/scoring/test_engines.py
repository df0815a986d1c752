"""``BatchScorer`` in a real Ray and a real Spark on this machine, against the rule on the whole."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import genkl_ext as gk
from genkl_ext.scoring.tables import LEFT_OUT

K = 5
RULE = gk.GenKL(num_classes=K, alpha=0.9, beta=0.1, sigma=0.1)
SCORER = gk.BatchScorer(RULE, column="probs", keep=("key",))


def predictions(n: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(K, 0.4), n).astype(np.float32)


def check(frame: Any, q: np.ndarray) -> None:
    """A pandas data frame with a row for each of these predictions, in any order."""
    frame = frame.sort_values("key")
    assert list(frame.columns) == ["key", *LEFT_OUT]
    assert frame["key"].tolist() == list(range(len(q)))
    expected = RULE.score(q)
    for name in LEFT_OUT:
        np.testing.assert_array_equal(frame[name].to_numpy(), getattr(expected, name))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs ray[data]")
    pytest.importorskip("ray.data", reason="needs ray[data]")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("batches", ["numpy", "pyarrow", "pandas"])
def test_ray_tasks(ray: Any, batches: str) -> None:
    q = predictions()
    rows = ray.data.from_items([{"key": i, "probs": row} for i, row in enumerate(q)])
    scored = rows.map_batches(SCORER, batch_format=batches, batch_size=128)
    check(scored.to_pandas(), q)


def test_ray_actors(ray: Any) -> None:
    q = predictions(300)

    class Actor:
        def __init__(self) -> None:
            self.scorer = SCORER

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return self.scorer(batch)

    rows = ray.data.from_items([{"key": i, "probs": row} for i, row in enumerate(q)])
    check(rows.map_batches(Actor, concurrency=1, batch_size=100).to_pandas(), q)


def test_ray_tells_of_a_bad_row(ray: Any) -> None:
    q = predictions(50)
    q[7, 2] = np.nan
    rows = ray.data.from_items([{"key": i, "probs": row} for i, row in enumerate(q)])
    message = r"(?s)column probs must be finite.*got nan at row \d+, class 2"  # row of its batch
    with pytest.raises(Exception, match=message):
        rows.map_batches(SCORER, batch_size=None).take_all()
    skipping = gk.BatchScorer(RULE, keep=("key",), on_bad_row="skip")
    assert rows.map_batches(skipping).count() == 49


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    sql = pytest.importorskip("pyspark.sql", reason="needs pyspark, and a Java runtime")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = sql.SparkSession.builder.master("local[2]").appName("genkl_ext tests")
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "1g",
        "spark.ui.showConsoleProgress": "false",
    }.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    yield session
    session.stop()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["float", "double"])
def test_spark(spark: Any, kind: str) -> None:
    q = predictions(400)
    rows = [(i, [float(x) for x in row]) for i, row in enumerate(q)]
    frame = spark.createDataFrame(rows, f"key long, probs array<{kind}>").repartition(3)
    schema = SCORER.spark_schema(frame.schema)
    wanted = q if kind == "float" else q.astype(np.float64)
    check(frame.mapInArrow(SCORER.arrow, schema).toPandas(), wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_spark_pandas_and_nulls(spark: Any) -> None:
    q = predictions(60)
    rows = [(i, [float(x) for x in row]) for i, row in enumerate(q)]
    frame = spark.createDataFrame([*rows, (60, None)], "key long, probs array<double>")
    scorer = gk.BatchScorer(RULE, keep=("key",), on_bad_row="skip")
    schema = scorer.spark_schema(frame.schema)
    check(frame.mapInPandas(scorer.pandas, schema).toPandas(), q.astype(np.float64))
    check(frame.mapInArrow(scorer.arrow, schema).toPandas(), q.astype(np.float64))
