// The page on which panels are made and drawn by Grafana's own packages: of its panels those whose
// drawing is published. What the others are drawn by is in Grafana itself, and in no package.
//
// With `require`: as modules the packages are bundled in Node's way, and look for the default exports
// of others in a wrong place.
const { flushSync } = require('react-dom');
const { createRoot } = require('react-dom/client');
const {
  EventBusSrv,
  FieldMatcherID,
  ThemeContext,
  dateTime,
  fieldMatchers,
  formattedValueToString,
  getFieldDisplayName,
  getFieldDisplayValues,
} = require('@grafana/data');
const { BigValue, PanelContextProvider, TimeSeries } = require('@grafana/ui');
const { TableNG } = require('@grafana/ui/unstable');
const { prepared, theme } = require('./grafana.js');

// Of each field of each frame its name, values, last value as it is written, colour and style.
window.told = async (panel, answers) => {
  const frames = await prepared(panel, answers);
  return frames.map((frame) =>
    frame.fields.map((field) => {
      const last = field.display?.(field.values.at(-1));
      return {
        name: getFieldDisplayName(field, frame, frames),
        type: field.type,
        values: field.values,
        written: last && formattedValueToString(last),
        colour: last?.color,
        custom: field.config.custom ?? {},
      };
    }),
  );
};

const WIDTH = 800;
const HEIGHT = 300;

function lines(panel, frames) {
  const times = frames.flatMap((frame) =>
    frame.fields.filter((field) => field.type === 'time').flatMap((field) => field.values),
  );
  const [from, to] = [Math.min(...times), Math.max(...times)].map((time) => dateTime(time));
  return (
    <TimeSeries
      frames={frames}
      timeRange={{ from, to, raw: { from, to } }}
      timeZone="utc"
      legend={panel.options.legend}
      width={WIDTH}
      height={HEIGHT}
      fields={panel.type === 'trend' ? alongField(panel.options.xField) : undefined}
    />
  );
}

// As Trend does it: not along time.
const alongField = (name) => ({
  x: fieldMatchers.get(FieldMatcherID.byName).get(name),
  y: fieldMatchers.get(FieldMatcherID.numeric).get({}),
});

function values(panel, frames) {
  return getFieldDisplayValues({
    data: frames,
    reduceOptions: panel.options.reduceOptions,
    fieldConfig: panel.fieldConfig,
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
  });
}

const DRAWN = {
  timeseries: lines,
  trend: lines,
  stat: (panel, frames) =>
    values(panel, frames).map((value, index) => (
      <BigValue
        key={index}
        value={value.display}
        colorMode={panel.options.colorMode}
        graphMode={panel.options.graphMode}
        justifyMode={panel.options.justifyMode}
        width={WIDTH}
        height={HEIGHT}
        theme={theme}
      />
    )),
  table: (panel, frames) => (
    <TableNG data={frames[0]} width={WIDTH} height={HEIGHT} cellHeight={panel.options.cellHeight} />
  ),
};

// Draws a panel into the page, and says whether its drawing is published.
window.drawn = async (panel, answers) => {
  if (!(panel.type in DRAWN)) {
    return false;
  }
  const frames = await prepared(panel, answers);
  document.body.style.background = theme.colors.background.primary;
  document.body.style.color = theme.colors.text.primary;
  document.body.replaceChildren(document.createElement('div'));
  const context = { eventsScope: 'panel', eventBus: new EventBusSrv() };
  flushSync(() =>
    createRoot(document.body.firstChild).render(
      <ThemeContext.Provider value={theme}>
        <PanelContextProvider value={context}>{DRAWN[panel.type](panel, frames)}</PanelContextProvider>
      </ThemeContext.Provider>,
    ),
  );
  return true;
};

// How many pixels of the plot have a colour of their own, and are no grid and no letters.
window.painted = () => {
  const canvas = document.querySelector('canvas');
  if (canvas === null) {
    return 0;
  }
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let at = 0; at < data.length; at += 4) {
    const channels = [data[at], data[at + 1], data[at + 2]];
    count += data[at + 3] > 0 && Math.max(...channels) - Math.min(...channels) > 24;
  }
  return count;
};
