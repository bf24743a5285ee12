// What a run page consists of: declared here, from the tables that its runs have.

const CURVES = {
  loss: [["optimisation", "loss", { family: "all" }], ["in_context", "loss_early"], ["in_context", "loss_late"],
    ["in_context", "repeat_later"]],
  score: [["in_context", "score"], ["in_context", "paired_score"]],
};
const BEST = 6;
const SOME = 8;

/**
 * @typedef {Object} Section
 * @property {string} id
 * @property {string} title
 * @property {string} [missing] what would measure it, where it was not
 * @property {import("./figure.js").Sketch[]} figures
 */

/** Whether a table has a row for each head, and nothing else. */
const ofHeads = (spec) => spec.dims.length === 2 && spec.dims[0].name === "layer" && spec.dims[1].name === "head";

const isNumber = (field) => !field.per && !field.text;

function curvesOf(spec, more = {}) {
  return spec.fields.filter(isNumber).map((field) => ({ table: spec.table, field: field.name, ...more }));
}

/**
 * Of every head: the fields that can be chosen, prefix matching first, each once.
 * @param {Map<string, Object>} tables the declarations, by name
 */
export function headCurves(tables) {
  // `heads` repeats as evidence what other tables have of their own.
  const order = ["induction", ...[...tables.keys()].filter((name) => name !== "heads"), "heads"];
  const curves = [...new Set(order)].flatMap((name) => (tables.has(name) && ofHeads(tables.get(name))
    ? curvesOf(tables.get(name), { top: BEST }) : []));
  return curves.filter((curve, at) => curves.findIndex((other) => other.field === curve.field) === at);
}

/** @param {Map<string, Object>} tables @returns {Section[]} */
export function sections(tables) {
  const having = (curves) => curves.filter(([table]) => tables.has(table))
    .map(([table, field, dims]) => ({ table, field, dims }));
  const chosen = (id, title, name, more = {}) => (tables.has(name)
    ? [{ id, title, choose: true, curves: curvesOf(tables.get(name), { top: SOME, dims: more.dims }), filters: more.filters }]
    : []);
  const heads = headCurves(tables);
  const together = (id, title) => {
    const curves = having(CURVES[id]);
    return curves.length ? [{ id, title, curves }] : [];
  };
  const every = [...tables.values()].filter((spec) => spec.table !== "transitions")
    .flatMap((spec) => curvesOf(spec, { top: SOME }));
  return [
    { id: "training", title: "Loss and in-context learning", figures: [...together("loss", "Loss"),
      ...together("score", "In-context score")],
    missing: "Neither loss nor in-context score was measured: expected the probe 'in_context' (a default one), or an "
      + "optimiser that is watched; leave probes= at its default." },
    { id: "heads", title: "Heads", figures: heads.length
      ? [{ id: "heads", title: "The best heads", choose: true, curves: heads }] : [],
    missing: "No head was measured: expected the probe 'induction' (a default one); leave probes= at its default." },
    { id: "circuit", title: "Circuit", figures: [],
      missing: "Not measured: expected the probe 'circuit', which reads 'heads', 'composition' and 'attribution'." },
    { id: "transitions", title: "Transitions", figures: [] },
    { id: "leads", title: "Leads", figures: [] },
    { id: "concepts", title: "Concepts", figures: [
      ...chosen("concepts", "Concepts along a direction", "concepts",
        { dims: { method: "diff_in_means" }, filters: ["concept", "layer", "method"] }),
      ...chosen("sparse", "Concepts from a few neurons", "sparse_probing", { filters: ["concept", "layer", "k"] })],
    missing: "Not measured: name concepts, as in TrainingDynamics(concepts=from_tokenizer(tokenizer)); see docs/concepts.md." },
    { id: "superposition", title: "Superposition", figures: [
      ...chosen("superposition", "Directions that share dimensions", "superposition"),
      ...chosen("residual", "The residual stream", "residual")],
    missing: "Not measured: expected the probe 'superposition', which needs concepts=." },
    { id: "neurons", title: "Neurons", figures: chosen("neurons", "Neurons of each block", "neurons"),
      missing: "Not measured: expected the probe 'neurons', and a model with MLPs." },
    { id: "all", title: "Every table", figures: every.length
      ? [{ id: "all", title: "Any field of any table", choose: true, curves: every }] : [],
    missing: "No table of a probe yet." },
  ];
}
