// Runs a script of this directory. Inputs come as INPUT_ETCD-ENDPOINTS, which is no name of a shell variable: it gets INPUT_ETCD_ENDPOINTS.
'use strict';

const { spawnSync } = require('node:child_process');
const path = require('node:path');

module.exports = (script) => {
  const env = {};
  for (const [name, value] of Object.entries(process.env)) {
    env[name.startsWith('INPUT_') ? name.replaceAll('-', '_') : name] = value;
  }
  const { status, error } = spawnSync('bash', [path.join(__dirname, script)], { stdio: 'inherit', env });
  if (error) {
    console.log(`::error title=rootless-ovl::bash: ${error.message}`);
  }
  process.exitCode = status ?? 1;
};
