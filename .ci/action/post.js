// The action's last part, at the end of the job, however it ended.
require('./script')('down.sh');
