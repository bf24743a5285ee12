// What Grafana does to the answers of a panel's queries before they are drawn, by its own packages:
// transformations, then units, colours, thresholds and styles.
const {
  FieldConfigOptionsRegistry,
  applyFieldOverrides,
  createTheme,
  identityOverrideProcessor,
  standardTransformers,
  standardTransformersRegistry,
  thresholdsOverrideProcessor,
  toDataFrame,
  transformDataFrame,
  valueMappingsOverrideProcessor,
} = require('@grafana/data');
const { lastValueFrom } = require('rxjs');

const theme = createTheme({ colors: { mode: 'dark' } });

// Some have two names.
const known = new Map(Object.values(standardTransformers).map((each) => [each.id, each]));
standardTransformersRegistry.setInit(() =>
  [...known].map(([id, each]) => ({ id, name: each.name, transformation: async () => each })),
);

const PROCESSORS = { thresholds: thresholdsOverrideProcessor, mappings: valueMappingsOverrideProcessor };

// Grafana's own list of options is not published: here are those that the panel sets.
function registryOf(panel) {
  const { defaults, overrides } = panel.fieldConfig;
  const ids = new Set([
    ...Object.keys(defaults).filter((id) => id !== 'custom'),
    ...Object.keys(defaults.custom ?? {}).map((id) => `custom.${id}`),
    ...overrides.flatMap((override) => override.properties.map((property) => property.id)),
  ]);
  return new FieldConfigOptionsRegistry(() =>
    [...ids].map((id) => ({
      id,
      path: id.replace(/^custom\./, ''),
      name: id,
      isCustom: id.startsWith('custom.'),
      process: PROCESSORS[id] ?? identityOverrideProcessor,
      override: () => null,
      editor: () => null,
      shouldApply: () => true,
    })),
  );
}

async function prepared(panel, answers) {
  const frames = answers.map((answer) => toDataFrame(answer));
  const made = await lastValueFrom(
    transformDataFrame(panel.transformations ?? [], frames, { interpolate: (text) => text }),
  );
  return applyFieldOverrides({
    data: made,
    fieldConfig: panel.fieldConfig,
    fieldConfigRegistry: registryOf(panel),
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
  });
}

module.exports = { prepared, theme };
